//! How long did it take?

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// CPU time of this thread: what others do on the machine is not in it.
pub fn thread_cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// What measuring nothing takes, nanoseconds: the middle of many.
pub fn overhead_ns() -> u64 {
    let mut times: Vec<u64> = (0..10_000).map(|_| timed(|| ()).1).collect();
    quantile(&mut times, 0.5)
}

/// Does something; what it gave and the nanoseconds it took.
pub fn timed<R>(work: impl FnOnce() -> R) -> (R, u64) {
    let begin = Instant::now();
    let result = work();
    (result, begin.elapsed().as_nanos() as u64)
}

/// A quantile of some times; 0 of none.
pub fn quantile(times: &mut [u64], q: f64) -> u64 {
    if times.is_empty() {
        return 0;
    }
    let at = ((times.len() - 1) as f64 * q).round() as usize;
    *times.select_nth_unstable(at).1
}
