//! Which endpoints may serve the request at all? One file per plugin.
//!
//! Some plugins are a scorer or a detector, too, and live there: `context-length-aware` and the
//! session affinity in [`crate::score`].

mod by_label;
mod endpoint_attribute;
mod header_testing;
mod label_selector;
mod prefix_affinity;
mod role;
mod slo_headroom;
mod topology_affinity;
mod utilization;

pub use by_label::ByLabel;
pub use endpoint_attribute::{
    Comparison, EndpointAttribute, FilterAlgorithm, FilterAlgorithmType, OnMissing, Threshold,
};
pub use header_testing::HeaderTesting;
pub use label_selector::{LabelExpression, LabelOperator, LabelSelector};
pub use prefix_affinity::{PrefixAffinity, TtftSource};
pub use role::{Decode, Encode, Prefill, ROLE_LABEL};
pub(crate) use role::{decodes, prefills, role_of};
pub use slo_headroom::SloHeadroomTier;
pub(crate) use topology_affinity::TOPOLOGY_PRODUCER_INERT;
pub use topology_affinity::{Nearness, TopologyAffinity};
pub use utilization::{Condition, Utilization, UtilizationMetric};

#[cfg(test)]
mod tests {
    use crate::Rng;
    use crate::fixture::{Fixture, every_spec};

    #[test]
    fn a_filter_adds_nobody_and_does_not_care_about_the_order() {
        for seed in 0..300 {
            let fixture = Fixture::random(&mut Rng::seeded(seed));
            for spec in every_spec() {
                let parts = spec.parts();
                for mut filter in parts.filter.into_iter().chain(parts.screener) {
                    let kept = fixture.filter(&mut *filter);
                    let mut backwards = fixture.reversed().filter(&mut *filter);
                    backwards.reverse();
                    assert_eq!(backwards, kept, "seed {seed} {spec:?}");
                    // What was removed before stays out, and takes nobody with it: those that are
                    // left are judged again, among themselves.
                    let left = fixture.only(&kept);
                    let again = left.filter(&mut *filter);
                    assert_eq!(again.len(), kept.iter().filter(|kept| **kept).count());
                }
            }
        }
    }
}
