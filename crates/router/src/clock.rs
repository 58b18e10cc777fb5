//! What time is it, as the core counts it? The one place that reads the clock for decisions.

use std::time::Instant;

use kvroute_core::Time;

/// Nanoseconds since the router started.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    origin: Instant,
}

impl Clock {
    /// A clock that shows zero.
    pub fn start() -> Clock {
        Clock { origin: Instant::now() }
    }

    /// The current time.
    pub fn now(&self) -> Time {
        Time(u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }
}
