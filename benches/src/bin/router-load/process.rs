//! CPU time and memory of a process and its children, from `/proc`.

use std::collections::HashMap;
use std::fs;
use std::ops::Sub;
use std::time::Duration;

use tokio::time::Instant;

/// Cores that other work may use before figures suffer.
pub const QUIET_CORES: f64 = 0.2;

/// `USER_HZ`, the unit of times in `/proc/PID/stat`: 100 on every architecture Linux has today.
const TICKS_PER_S: f64 = 100.0;

/// What processes have used.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// User and system time. The kernel scales it to the exact run time, so only the unit is
    /// coarse.
    pub cpu_s: f64,
    /// `VmRSS`.
    pub rss_mb: f64,
}

impl Sub for Usage {
    type Output = Usage;

    fn sub(self, before: Usage) -> Usage {
        Usage { cpu_s: self.cpu_s - before.cpu_s, rss_mb: self.rss_mb - before.rss_mb }
    }
}

/// Of `pid` and everything below it; nothing for a process that has gone.
pub fn usage(pid: Option<u32>) -> Usage {
    sum(&pid.map(tree).unwrap_or_default())
}

/// Of this process alone: the others are its children.
pub fn usage_of_this() -> Usage {
    sum(&[std::process::id()])
}

fn sum(pids: &[u32]) -> Usage {
    let mut sum = Usage::default();
    for &pid in pids {
        let Some(stat) = fields(pid) else { continue };
        let ticks = |at: usize| stat.get(at).and_then(|text| text.parse::<f64>().ok());
        // Fields 14 to 17 of proc(5), counted from the state, which is field 3: user and system
        // time, and those of children that have ended.
        sum.cpu_s += (11..15).filter_map(ticks).sum::<f64>() / TICKS_PER_S;
        sum.rss_mb += rss_kb(pid).unwrap_or(0.0) / 1024.0;
    }
    sum
}

/// CPU seconds that the whole machine has worked, interrupts and stolen time included.
pub fn machine_cpu_s() -> f64 {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let total = stat.lines().next().unwrap_or_default();
    // proc(5): after the name, the fourth and the fifth number are time without work.
    let ticks = total.split_whitespace().skip(1).take(8).enumerate();
    let busy = ticks.filter(|(at, _)| !matches!(at, 3 | 4));
    busy.filter_map(|(_, text)| text.parse::<f64>().ok()).sum::<f64>() / TICKS_PER_S
}

/// Waits until the machine has been quiet for a moment, for `at_most`.
pub async fn quiet(at_most: Duration) {
    let begin = Instant::now();
    loop {
        let (since, before) = (Instant::now(), machine_cpu_s());
        tokio::time::sleep(Duration::from_secs(1)).await;
        let cores = (machine_cpu_s() - before) / since.elapsed().as_secs_f64();
        if cores <= QUIET_CORES || begin.elapsed() >= at_most {
            return;
        }
    }
}

/// `pid` and everything below it.
pub fn tree(pid: u32) -> Vec<u32> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    for child in pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()) {
        let parent = fields(child).and_then(|stat| stat.get(1)?.parse().ok());
        children.entry(parent.unwrap_or(0)).or_default().push(child);
    }
    let mut found = vec![pid];
    let mut at = 0;
    while let Some(next) = found.get(at) {
        found.extend(children.remove(next).unwrap_or_default());
        at += 1;
    }
    found
}

/// What follows the name in `/proc/PID/stat`; the name may hold anything.
fn fields(pid: u32) -> Option<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    Some(rest.split_whitespace().map(str::to_owned).collect())
}

fn rss_kb(pid: u32) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_used_something() {
        let pid = std::process::id();
        assert!(tree(pid).contains(&pid));
        let usage = usage(Some(pid));
        assert!(usage.rss_mb > 0.1 && usage.cpu_s >= 0.0, "{usage:?}");
        assert_eq!(super::usage(None).rss_mb, 0.0);
        assert!(machine_cpu_s() >= usage.cpu_s);
    }
}
