//! Which endpoints may serve the request at all? One file per plugin.

mod label_selector;
mod prefix_affinity;
mod role;
mod slo_headroom;

pub use label_selector::{LabelExpression, LabelOperator, LabelSelector};
pub use prefix_affinity::{PrefixAffinity, TtftSource};
pub use role::{Decode, Prefill, ROLE_LABEL};
pub(crate) use role::{decodes, prefills, role_of};
pub use slo_headroom::SloHeadroomTier;
