//! Ages of blocks, in steps that grow with age: hazards change fast for the young and slowly for the old.

/// Steps of age.
pub(super) const AGES: usize = 40;
/// Where the first step ends, in seconds. Each two steps double it: the last one begins at 12 days.
const FIRST_END: f32 = 1.0;

/// Where a step begins, in seconds.
pub(super) fn begin(step: usize) -> f32 {
    if step == 0 { 0.0 } else { FIRST_END * ((step - 1) as f32 / 2.0).exp2() }
}

/// How long a step is, in seconds.
pub(super) fn width(step: usize) -> f32 {
    begin(step + 1) - begin(step)
}

/// The step of an age in seconds.
pub(super) fn step(age: f32) -> usize {
    if age < FIRST_END { 0 } else { (((age / FIRST_END).log2() * 2.0) as usize + 1).min(AGES - 1) }
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
        assert_eq!(step(1e9), AGES - 1);
    }
}
