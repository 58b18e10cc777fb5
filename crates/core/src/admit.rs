//! Is a request let in at all? One file per plugin, and the rule that holds without any.
//!
//! Only requests of a priority below 0 are ever refused.

mod latency_slo;
mod probabilistic;

pub use latency_slo::LatencySlo;
pub use probabilistic::Probabilistic;

/// What a client reads whose request was refused by [`admit_below_saturation`]: llm-d's words.
pub const SATURATED: &str = "system saturated, sheddable request dropped";

/// llm-d's rule without flow control: a full fleet serves nobody whose priority is below 0.
pub fn admit_below_saturation(priority: i32, saturation: f64) -> Result<(), String> {
    if priority < 0 && saturation >= 1.0 { Err(SATURATED.to_owned()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_low_priorities_are_refused_and_only_by_a_full_fleet() {
        for (priority, saturation, admitted) in [
            (-1, 1.0, false),
            (-1, 7.5, false),
            (i32::MIN, f64::INFINITY, false),
            (-1, 0.999, true),
            (-1, 0.0, true),
            (0, 1.0, true),
            (9, 7.5, true),
        ] {
            let outcome = admit_below_saturation(priority, saturation);
            assert_eq!(outcome.is_ok(), admitted, "{priority} {saturation}");
            if let Err(words) = outcome {
                assert_eq!(words, "system saturated, sheddable request dropped");
            }
        }
    }
}
