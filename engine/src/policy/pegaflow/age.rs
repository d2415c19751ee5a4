//! Ages of blocks, in steps that grow with age: hazards change fast for the young and slowly for the old.

/// Steps of age. The first ends after a second, each two double it: the last one begins at 6 days.
pub(super) const AGES: usize = 40;

/// Where each step begins, in seconds; after the last one, where that would end.
const BEGINS: [f32; AGES + 1] = {
    let mut begins = [0.0, 1.0, std::f32::consts::SQRT_2];
    let mut all = [0.0; AGES + 1];
    let mut step = 1;
    while step <= AGES {
        all[step] = begins[1];
        begins = [0.0, begins[2], begins[1] * 2.0];
        step += 1;
    }
    all
};

/// Where a step begins, in seconds.
pub(super) fn begin(step: usize) -> f32 {
    BEGINS[step]
}

/// How long a step is, in seconds.
pub(super) fn width(step: usize) -> f32 {
    begin(step + 1) - begin(step)
}

/// The step of an age in seconds, which is not negative. Half steps of the logarithm are in the bits of the number.
pub(super) fn step(age: f32) -> usize {
    const SQRT_2: u32 = std::f32::consts::SQRT_2.to_bits();
    const ONE: u32 = 1.0f32.to_bits();
    let bits = age.to_bits();
    if bits < ONE {
        return 0;
    }
    let beyond = bits - ONE;
    let doublings = (beyond >> 23) as usize;
    let is_upper_half = (beyond & 0x7f_ffff) >= SQRT_2 - ONE;
    (1 + 2 * doublings + usize::from(is_upper_half)).min(AGES - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_age_lies_in_its_step() {
        for age in [0.0, 0.1, 0.125, 0.2, 1.0, 3.0, 59.0, 120.0, 3600.0, 86_400.0] {
            let at = step(age);
            assert!(begin(at) <= age * 1.0001 && age <= begin(at + 1) * 1.0001, "{age} in {at}");
        }
        assert_eq!((step(0.999_99), step(1e9), step(f32::INFINITY)), (0, AGES - 1, AGES - 1));
        for at in 1..AGES {
            let exact = ((at - 1) as f32 / 2.0).exp2();
            assert!((begin(at) / exact - 1.0).abs() < 1e-6 && step(begin(at)) == at, "step {at}");
        }
    }
}
