//! Is a request let in at all? One file per plugin, and the rule that holds without any.
//!
//! Only requests of a priority below 0 are ever refused.

mod latency_slo;
mod probabilistic;

pub use latency_slo::LatencySlo;
pub use probabilistic::Probabilistic;

/// Whether a request may have to give way at all.
pub fn is_sheddable(priority: i32) -> bool {
    priority < 0
}

/// llm-d's rule without flow control: a full fleet serves nobody whose priority is below 0.
pub fn is_shed(priority: i32, saturation: f64) -> bool {
    is_sheddable(priority) && saturation >= 1.0
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
            assert_eq!(is_shed(priority, saturation), !admitted, "{priority} {saturation}");
        }
    }
}
