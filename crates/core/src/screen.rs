//! Which endpoints must no profile see for this request? One file per screener. A screener is a
//! [`crate::stage::Filter`] that runs once, before all profiles.

mod rollout;
pub(crate) mod selector;

pub use rollout::{
    GatingMode, HeaderSelector, RequireRoles, RevisionGating, Rollout, RolloutScope, SelectorMode,
};
