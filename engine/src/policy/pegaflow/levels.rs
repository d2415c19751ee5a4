//! The order in which leaves leave: lists of equal worth, and beside them lists of equal age, which say when a block's
//! worth is to be looked at again. All steps take constant time.

use super::age::AGES;

/// Levels of worth, four to a doubling.
pub(super) const LEVELS: usize = 128;
const LEVEL_OF_ONE: i32 = 100;

/// No block.
pub(super) const NONE: u32 = u32::MAX;

/// A block's neighbours in the two lists.
#[derive(Debug, Clone, Copy)]
pub(super) struct Links {
    by_worth: [u32; 2],
    by_age: [u32; 2],
    pub(super) level: u8,
    pub(super) age_step: u8,
}

impl Default for Links {
    fn default() -> Self {
        Self { by_worth: [NONE; 2], by_age: [NONE; 2], level: 0, age_step: 0 }
    }
}

/// What has links.
pub(super) trait Linked {
    fn links_of(&self) -> &Links;
    fn links(&mut self) -> &mut Links;
}

/// Ends of a list: first and last.
#[derive(Debug, Clone, Copy)]
struct Ends([u32; 2]);

/// The level of a worth, which is not negative. The whole part of its logarithm is its exponent; where in a doubling it
/// lies, the bits behind that say.
pub(super) fn level(worth: f32) -> u8 {
    /// The bits of 2 to the power of 1/4, 2/4 and 3/4.
    const QUARTERS: [u32; 3] = [0x18_37f0, 0x35_04f3, 0x57_44fd];
    let bits = worth.to_bits();
    let doublings = (bits >> 23) as i32 - 127;
    let quarters = QUARTERS.iter().filter(|quarter| bits & 0x7f_ffff >= **quarter).count() as i32;
    (LEVEL_OF_ONE + 4 * doublings + quarters).clamp(0, LEVELS as i32 - 1) as u8
}

/// The lists.
pub(super) struct Levels {
    by_worth: [Ends; LEVELS],
    by_age: [Ends; AGES],
    /// Which levels are not empty.
    filled: u128,
}

impl Levels {
    pub(super) fn new() -> Self {
        Self { by_worth: [Ends([NONE; 2]); LEVELS], by_age: [Ends([NONE; 2]); AGES], filled: 0 }
    }

    /// The block that came first to the lowest level.
    pub(super) fn lowest(&self) -> Option<u32> {
        (self.filled != 0).then(|| self.by_worth[self.filled.trailing_zeros() as usize].0[0])
    }

    /// All blocks, those of the lowest level first.
    pub(super) fn lowest_first<'a, N: Linked>(&'a self, nodes: &'a [N]) -> impl Iterator<Item = u32> + 'a {
        let first = |level: usize| self.by_worth.get(level).map_or(NONE, |ends| ends.0[0]);
        let lists = (self.filled.trailing_zeros() as usize..LEVELS).map(first);
        lists.flat_map(move |first| {
            let listed = |at: u32| (at != NONE).then_some(at);
            std::iter::successors(listed(first), move |at| listed(nodes[*at as usize].links_of().by_worth[1]))
        })
    }

    /// The block that came first to a step of age.
    pub(super) fn first_of_age(&self, step: usize) -> Option<u32> {
        Some(self.by_age[step].0[0]).filter(|first| *first != NONE)
    }

    pub(super) fn push(&mut self, nodes: &mut [impl Linked], at: u32, level: u8, age_step: u8) {
        let links = nodes[at as usize].links();
        (links.level, links.age_step) = (level, age_step);
        push(&mut self.by_worth[level as usize], nodes, at, |links| &mut links.by_worth);
        push(&mut self.by_age[age_step as usize], nodes, at, |links| &mut links.by_age);
        self.filled |= 1 << level;
    }

    pub(super) fn unlink(&mut self, nodes: &mut [impl Linked], at: u32) {
        let Links { level, age_step, .. } = *nodes[at as usize].links();
        unlink(&mut self.by_worth[level as usize], nodes, at, |links| &mut links.by_worth);
        unlink(&mut self.by_age[age_step as usize], nodes, at, |links| &mut links.by_age);
        if self.by_worth[level as usize].0[0] == NONE {
            self.filled &= !(1 << level);
        }
    }
}

fn push(ends: &mut Ends, nodes: &mut [impl Linked], at: u32, of: fn(&mut Links) -> &mut [u32; 2]) {
    let last = ends.0[1];
    *of(nodes[at as usize].links()) = [last, NONE];
    match last {
        NONE => ends.0[0] = at,
        last => of(nodes[last as usize].links())[1] = at,
    }
    ends.0[1] = at;
}

fn unlink(ends: &mut Ends, nodes: &mut [impl Linked], at: u32, of: fn(&mut Links) -> &mut [u32; 2]) {
    let [before, after] = std::mem::replace(of(nodes[at as usize].links()), [NONE; 2]);
    match before {
        NONE => ends.0[0] = after,
        before => of(nodes[before as usize].links())[1] = after,
    }
    match after {
        NONE => ends.0[1] = before,
        after => of(nodes[after as usize].links())[0] = before,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_quarters_of_doublings() {
        let mut worth = 1e-7f32;
        while worth < 50.0 {
            let exact = f64::from(worth).log2() * 4.0 + 100.0;
            assert_eq!(f64::from(level(worth)), exact.floor().max(0.0), "{worth}");
            worth *= 1.013;
        }
        assert_eq!((level(0.0), level(1.0), level(1e30), level(f32::INFINITY)), (0, 100, 127, 127));
    }
}
