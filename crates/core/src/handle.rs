//! Which profiles run for a request, and who does which part of the work? One file per kind of
//! profile handler.

mod data_parallel;
mod decider;
mod disagg;
mod header;
mod single;

pub use data_parallel::DataParallel;
pub use decider::{Always, AlwaysMultimodal, Decider, PrefixBased};
pub use disagg::{
    Deciders, Disagg, DisaggHeaders, DisaggProfiles, PrefillDecode, StageOrder, Stages,
};
pub use header::Header;
pub use single::Single;
