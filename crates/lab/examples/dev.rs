#![allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::disallowed_types
)]
use kvroute_core::plan::Plan;
use kvroute_lab::{record::*, scenario::*, sim::*};
use std::path::Path;
fn pct(v: &mut Vec<f64>, p: f64) -> f64 {
    if v.is_empty() {
        return 0.0;
    }
    v.sort_by(f64::total_cmp);
    let a = (v.len() - 1) as f64 * p / 100.0;
    let b = a.floor() as usize;
    let c = (b + 1).min(v.len() - 1);
    v[b] + (v[c] - v[b]) * (a - b as f64)
}
fn main() {
    let args: Vec<String> = std::env::args().collect();
    // dev scenario seed0 seeds verbose config...
    let sc = &args[1];
    let scenario = if sc.ends_with(".yaml") {
        Scenario::parse(&std::fs::read_to_string(sc).unwrap(), sc).unwrap()
    } else {
        Scenario::built_in(sc).unwrap()
    };
    let (s0, n, verbose): (u64, u64, bool) =
        (args[2].parse().unwrap(), args[3].parse().unwrap(), args[4] == "v");
    let mut jobs = vec![];
    for c in &args[5..] {
        for s in s0..s0 + n {
            jobs.push((c.clone(), s));
        }
    }
    let next = std::sync::atomic::AtomicUsize::new(0);
    let out = std::sync::Mutex::new(vec![]);
    std::thread::scope(|t| {
        for _ in 0..2 {
            t.spawn(|| {
                loop {
                    let i = next.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                    let Some((c, s)) = jobs.get(i) else { break };
                    let policy = if c == "oracle" {
                        Policy::Oracle
                    } else if c == "kvroute" {
                        Policy::Plan(Box::new(Plan::precise()))
                    } else if c == "cost" {
                        Policy::Plan(Box::new(Plan::least_cost()))
                    } else {
                        let text = std::fs::read_to_string(c).unwrap();
                        Policy::Plan(Box::new(
                            Plan::build(&kvroute_wire::config::parse(&text, c).unwrap()).unwrap(),
                        ))
                    };
                    let arm = Arm { name: c.clone(), policy };
                    let t0 = std::time::Instant::now();
                    let mut reasons: std::collections::BTreeMap<String, u64> = Default::default();
                let mut cb = |d: &kvroute_core::decision::DecisionRecord| { *reasons.entry(format!("{:?}", d.reason)).or_default() += 1; if d.candidates_degraded > 0 { *reasons.entry("degraded".into()).or_default() += 1; } };
                let r = run(&scenario, Path::new("."), &arm, *s, &mut Watch { progress: &mut |_| {}, decisions: Some(&mut cb) }).unwrap();
                if verbose { println!("{reasons:?}"); }
                let cpu = t0.elapsed().as_secs_f64();
                    out.lock().unwrap().push((i, r, cpu));
                }
            });
        }
    });
    let mut out = out.into_inner().unwrap();
    out.sort_by_key(|o| o.0);
    let mut agg: std::collections::BTreeMap<String, Vec<[f64; 12]>> = Default::default();
    for (_, r, cpu) in &out {
        let mut st = vec![];
        let (mut wq, mut kv) = (Tally::default(), Tally::default());
        for (i, s) in r.stages.iter().enumerate() {
            wq.merge(&s.waiting);
            kv.merge(&s.kv_usage);
            if s.warmup {
                continue;
            }
            let rq: Vec<&RequestRecord> =
                r.requests.iter().filter(|q| q.stage as usize == i).collect();
            let ok: Vec<&&RequestRecord> =
                rq.iter().filter(|q| q.ending == Ending::Answered).collect();
            let first = rq.first().map_or(0.0, |q| q.sent_s);
            let last = ok.iter().map(|q| q.sent_s + q.total_s as f64).fold(0.0, f64::max);
            let tok: f64 = ok.iter().map(|q| q.counted_tokens as f64).sum::<f64>() / (last - first);
            let mut tt: Vec<f64> = ok.iter().map(|q| q.ttft_s as f64).collect();
            let mean = tt.iter().sum::<f64>() / tt.len().max(1) as f64;
            let hit = ok.iter().map(|q| q.cached_tokens as f64).sum::<f64>()
                / ok.iter().map(|q| q.prompt_tokens as f64).sum::<f64>();
            let itl = s.gaps_s.sum() / (2.0 * s.gaps_s.count() as f64 + ok.len() as f64);
            let (p90, p99) = (pct(&mut tt, 90.0), pct(&mut tt, 99.0));
            if verbose {
                println!(
                    "{:>24} seed {} rate {:>4} n {:>5} ok {:>5} tok/s {:>7.0} ttft {:>7.2} p90 {:>7.2} p99 {:>7.2} itl {:>5.1} tpot {:>5.1} hit {:.2}",
                    r.name.rsplit('/').next().unwrap(),
                    r.seed,
                    s.rate,
                    rq.len(),
                    ok.len(),
                    tok,
                    mean,
                    p90,
                    p99,
                    itl * 1e3,
                    s.gaps_s.mean() * 1e3,
                    hit
                );
            }
            st.push((ok.len() as f64, tok, mean, p90, p99, itl, hit, s.gaps_s.mean()));
        }
        let n: f64 = st.iter().map(|s| s.0).sum();
        let w = |f: &dyn Fn(&(f64, f64, f64, f64, f64, f64, f64, f64)) -> f64| {
            st.iter().map(|s| s.0 * f(s)).sum::<f64>() / n
        };
        let tok = st.iter().map(|s| s.1).sum::<f64>() / st.len() as f64;
        let ends = r
            .requests
            .iter()
            .filter(|q| q.ending != Ending::Answered && q.ending != Ending::Refused)
            .count();
        let row = [
            tok,
            w(&|s| s.2),
            w(&|s| s.3),
            w(&|s| s.4),
            w(&|s| s.5) * 1e3,
            w(&|s| s.7) * 1e3,
            w(&|s| s.6),
            wq.mean(),
            wq.percentile(90.0),
            wq.max(),
            kv.mean(),
            *cpu,
        ];
        println!(
            "{:>24} seed {:>3}: tok/s {:>7.0} ttft mean {:>6.3} p90 {:>6.3} p99 {:>6.2} itl {:>5.2} tpot {:>5.2} hit {:.3} wq {:.2}/{:.0}/{:.0} kv {:.3} bad {} | {:.2} s virt {:.0}",
            r.name.rsplit('/').next().unwrap(),
            r.seed,
            row[0],
            row[1],
            row[2],
            row[3],
            row[4],
            row[5],
            row[6],
            row[7],
            row[8],
            row[9],
            row[10],
            ends,
            cpu,
            r.requests.last().map_or(0.0, |q| q.sent_s)
        );
        agg.entry(r.name.clone()).or_default().push(row);
    }
    for (name, rows) in agg {
        let k = rows.len() as f64;
        let m = |i: usize| rows.iter().map(|r| r[i]).sum::<f64>() / k;
        println!(
            "MEAN {:>24}: tok/s {:>7.0} ttft mean {:>6.3} p90 {:>6.3} p99 {:>6.2} itl {:>5.2} tpot {:>5.2} hit {:.3} wq {:.2}/{:.1}/{:.0} kv {:.3} | {:.2} s",
            name.rsplit('/').next().unwrap(),
            m(0),
            m(1),
            m(2),
            m(3),
            m(4),
            m(5),
            m(6),
            m(7),
            m(8),
            m(9),
            m(10),
            m(11)
        );
    }
}
