//! A decision in words and tables.

use super::change;
use super::table::{Look, Paint, Table, WIDTH, count, number};
use super::view::{Candidate, Filter, Outcome, Profile, Prompt, Record, Removed, Row, Shown};

/// Endpoints of one table; of a larger fleet the best come first.
const ROWS_MAX: usize = 40;
/// Columns of the names of facts.
const NAME_WIDTH: usize = 14;
/// The tiers, as records name them.
const TIERS: [&str; 4] = ["gpu", "cpu", "disk", "other"];

/// Everything about one request, a line each.
pub fn lines(shown: &Shown, paint: Paint) -> Vec<String> {
    let mut out = Lines { lines: Vec::new(), paint };
    let model = shown.decision.as_ref().map_or("", |record| record.model.as_str());
    if let Some(prompt) = &shown.prompt {
        out.fact("Prompt", &prompt_text(prompt));
    }
    if !model.is_empty() {
        out.fact("Model", model);
    }
    if let Some(rejected) = &shown.rejected {
        let text =
            format!("{} with status {} ({})", rejected.message, rejected.status, rejected.reason);
        out.fact("Refused", &text);
    }
    if let Some(record) = &shown.decision {
        out.decision(record, shown);
    }
    if let Some(outcome) = &shown.outcome {
        out.fact("Outcome", &outcome_text(outcome));
    }
    for what in &shown.left_out {
        out.fact("Not known", what);
    }
    if let Some(record) = &shown.decision {
        out.tables(record);
    }
    out.lines
}

struct Lines {
    lines: Vec<String>,
    paint: Paint,
}

impl Lines {
    /// A name and what it is, in as many lines as that takes.
    fn fact(&mut self, name: &str, text: &str) {
        let mut name = name;
        for line in wrapped(text, WIDTH - NAME_WIDTH - 1) {
            self.lines
                .push(format!("{} {line}", self.paint.faint(&format!("{name:<NAME_WIDTH$}"))));
            name = "";
        }
    }

    fn title(&mut self, text: &str) {
        self.lines.push(String::new());
        self.lines.push(self.paint.strong(text));
    }

    fn table(&mut self, table: &Table) {
        self.lines.extend(table.lines(self.paint));
    }

    fn decision(&mut self, record: &Record, shown: &Shown) {
        let Record { endpoint, profile, .. } = record;
        let endpoint = self.paint.strong(endpoint);
        self.fact("Goes to", &format!("{endpoint}, by profile {profile}"));
        for header in &record.request_headers {
            self.fact("Told with it", &format!("{}: {}", header.name, header.value));
        }
        if !shown.fallback.is_empty() {
            self.fact("If it fails", &shown.fallback.join(", then "));
        }
        self.fact("Knowledge", &format!("{}: {}", record.mode, in_words(&record.reason)));
        let hit = format!(
            "{} of {} tokens there, {} where most is",
            count(record.chosen_tokens.into()),
            count(record.prompt_tokens.into()),
            count(record.available_tokens.into())
        );
        self.fact("Predicted hit", &hit);
        self.fact("Tie", &tie_text(record.tied, &record.seed));
        self.fact("Margin", &margin_text(record.margin));
    }

    fn tables(&mut self, record: &Record) {
        let order = by_total(&record.scores);
        let mut candidates: Vec<&Candidate> = record.candidates.iter().collect();
        let place = |c: &&Candidate| {
            order.iter().position(|row| row.endpoint == c.endpoint).unwrap_or(usize::MAX)
        };
        candidates.sort_by_key(place);
        self.title("What each endpoint holds of the prompt, in blocks");
        self.table(&holdings(&candidates, &record.endpoint));
        self.more(candidates.len());
        self.title("Load");
        self.table(&loads(&candidates, &record.endpoint));
        self.more(candidates.len());
        let removed = record.candidates.iter().filter_map(|candidate| {
            let by = candidate.removed_by.clone()?;
            Some(Removed { endpoint: candidate.endpoint.clone(), by })
        });
        let removed: Vec<Removed> = removed.collect();
        self.filters(&record.filters, &removed);
        self.scores(&order, &record.endpoint);
        for profile in &record.others {
            self.profile(profile, &record.seed);
        }
    }

    fn profile(&mut self, profile: &Profile, seed: &str) {
        let Profile { step, endpoint, failed, .. } = profile;
        self.title(&format!("Profile {} ({step})", profile.profile));
        match (endpoint, failed) {
            (Some(endpoint), _) => {
                let text = self.paint.strong(endpoint);
                self.fact("Chooses", &text);
                self.fact("Tie", &tie_text(profile.tied, seed));
                self.fact("Margin", &margin_text(profile.margin));
            }
            (None, why) => self.fact("Chooses", &nobody(why.as_deref())),
        }
        self.filters(&profile.filters, &profile.removed);
        self.scores(&by_total(&profile.scores), endpoint.as_deref().unwrap_or_default());
    }

    fn filters(&mut self, filters: &[Filter], removed: &[Removed]) {
        self.title("Filters");
        if filters.is_empty() {
            self.lines.push("  None removed anybody.".to_owned());
        }
        for Filter { name, candidates, kept } in filters {
            let out = removed.iter().filter(|removed| removed.by == *name);
            let out: Vec<&str> = out.map(|removed| removed.endpoint.as_str()).collect();
            let names = match out.len() {
                0 => String::new(),
                n if n <= ROWS_MAX => format!("; out: {}", out.join(", ")),
                n => format!("; out: {} and {} more", out[..ROWS_MAX].join(", "), n - ROWS_MAX),
            };
            let why = filter_in_words(name);
            self.lines.push(format!("  {name}: {kept} of {candidates} left{why}{names}"));
        }
    }

    fn scores(&mut self, order: &[&Row], chosen: &str) {
        self.title("Scores: raw score x weight = contribution");
        let Some(best) = order.first() else {
            self.lines.push("  No endpoint was left to be scored.".to_owned());
            return;
        };
        for (at, cell) in (1..).zip(&best.scores) {
            let weight = number(cell.weight);
            self.lines.push(format!("  [{at}] {}, weight {weight}", cell.scorer));
        }
        let heads = (1..=best.scores.len()).map(|at| format!("[{at}]"));
        let head = std::iter::once("endpoint".to_owned()).chain(heads);
        let mut table = Table::new(head.chain(["total".to_owned()]));
        let mut clamped = false;
        for row in order.iter().take(ROWS_MAX) {
            let cells = row.scores.iter().map(|cell| {
                clamped |= cell.clamped;
                let mark = if cell.clamped { "!" } else { "" };
                let contribution = number(cell.contribution);
                match cell.raw {
                    Some(raw) => {
                        format!("{}{mark} x {} = {contribution}", number(raw), number(cell.weight))
                    }
                    None => "no data = 0".to_owned(),
                }
            });
            let cells = std::iter::once(row.endpoint.clone()).chain(cells);
            table.row(
                look(&row.endpoint, chosen, false),
                cells.chain([number(row.total)]).collect(),
            );
        }
        self.table(&table);
        self.more(order.len());
        if clamped {
            self.lines.push("  ! counts as the nearest of 0 and 1".to_owned());
        }
        self.title("For the second to win");
        let owned: Vec<Row> = order.iter().map(|row| (*row).clone()).collect();
        self.lines.extend(change::lines(&owned, chosen));
    }

    fn more(&mut self, rows: usize) {
        if let Some(more @ 1..) = rows.checked_sub(ROWS_MAX) {
            self.lines.push(format!("  and {more} more (--json has all)"));
        }
    }
}

/// Lines of whole words; a word that is too long has a line of its own.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let last = lines.last_mut().expect("there is one from the start");
        if !last.is_empty() && last.chars().count() + 1 + word.chars().count() > width {
            lines.push(word.to_owned());
        } else {
            let space = if last.is_empty() { "" } else { " " };
            *last += &format!("{space}{word}");
        }
    }
    lines
}

fn by_total(rows: &[Row]) -> Vec<&Row> {
    let mut order: Vec<&Row> = rows.iter().collect();
    order.sort_by(|a, b| b.total.total_cmp(&a.total));
    order
}

fn look(endpoint: &str, chosen: &str, removed: bool) -> Look {
    match removed {
        _ if endpoint == chosen => Look::Strong,
        true => Look::Faint,
        false => Look::Usual,
    }
}

fn holdings(candidates: &[&Candidate], chosen: &str) -> Table {
    let held = |tier: &str| {
        let blocks = |c: &&Candidate| c.hit.by_tier.get(tier).copied().unwrap_or(0);
        candidates.iter().any(|candidate| blocks(candidate) > 0)
    };
    // The tiers that matter here; accelerators always do.
    let tiers: Vec<&str> = TIERS.into_iter().filter(|tier| *tier == "gpu" || held(tier)).collect();
    let head = ["endpoint", "knowledge", "of blocks"].into_iter().chain(tiers.iter().copied());
    let mut table = Table::new(head.chain(["with expected", "history", "hit", "hit tokens"]));
    for candidate in candidates.iter().take(ROWS_MAX) {
        let hit = &candidate.hit;
        let of = format!("{} x {}", count(hit.blocks.into()), hit.block_size);
        let mut row = vec![candidate.endpoint.clone(), candidate.reason.clone(), of];
        row.extend(tiers.iter().map(|tier| {
            hit.by_tier.get(*tier).map_or_else(|| "0".to_owned(), |blocks| count((*blocks).into()))
        }));
        let rest = [hit.expected, hit.history, hit.matched, hit.predicted_tokens];
        row.extend(rest.map(|n| count(n.into())));
        table.row(look(&candidate.endpoint, chosen, candidate.removed_by.is_some()), row);
    }
    table
}

fn loads(candidates: &[&Candidate], chosen: &str) -> Table {
    let mut table = Table::new([
        "endpoint",
        "waiting",
        "running",
        "KV used",
        "in flight",
        "its tokens",
        "to compute",
        "metrics age",
    ]);
    let told = |n: Option<u32>| n.map_or_else(|| "-".to_owned(), |n| count(n.into()));
    for candidate in candidates.iter().take(ROWS_MAX) {
        let load = &candidate.load;
        let kv = load.kv_usage.map(|share| format!("{} %", number(100.0 * share)));
        let age = load.metrics_age_s.map(|age| format!("{} s", number(age)));
        let row = vec![
            candidate.endpoint.clone(),
            told(load.waiting),
            told(load.running),
            kv.unwrap_or_else(|| "-".to_owned()),
            count(load.inflight_requests.into()),
            count(load.inflight_tokens),
            count(load.uncached_tokens.into()),
            age.unwrap_or_else(|| "never".to_owned()),
        ];
        table.row(look(&candidate.endpoint, chosen, candidate.removed_by.is_some()), row);
    }
    table
}

fn prompt_text(prompt: &Prompt) -> String {
    let known = match &prompt.known {
        serde_json::Value::String(known) => known.clone(),
        serde_json::Value::Object(none) => {
            let why = none.get("none").and_then(serde_json::Value::as_str).unwrap_or_default();
            format!("counted by length, because there are none: {}", why.replace('_', " "))
        }
        _ => "counted".to_owned(),
    };
    let mut parts = Vec::new();
    if prompt.prompts > 1 {
        parts.push(format!("{} prompts", prompt.prompts));
    }
    match prompt.rendered_chars {
        Some(chars) if known == "estimated" => {
            parts.push(format!("{} characters, not rendered", count(chars)));
        }
        Some(chars) => parts.push(format!("{} characters as rendered", count(chars))),
        None => {}
    }
    parts.push(format!("{} tokens ({known})", count(prompt.tokens.into())));
    for blocks in &prompt.blocks {
        let of = format!(
            "{} {} blocks of {} tokens",
            count(blocks.blocks),
            blocks.space,
            blocks.block_size
        );
        parts.push(of);
    }
    parts.join(", ")
}

fn tie_text(tied: u32, seed: &str) -> String {
    match tied {
        0 | 1 => format!("none (seed {seed})"),
        n => format!("{n} have the best total; seed {seed} decided"),
    }
}

fn margin_text(margin: Option<f64>) -> String {
    match margin {
        None => "nobody else was left".to_owned(),
        Some(margin) if margin < 0.0 => {
            format!("{} behind the best: the picker does not just take the best", number(-margin))
        }
        Some(margin) => format!("{} ahead of the next", number(margin)),
    }
}

fn nobody(why: Option<&str>) -> String {
    why.map_or_else(|| "nobody: it is not needed".to_owned(), |why| format!("nobody: {why}"))
}

fn outcome_text(outcome: &Outcome) -> String {
    let Outcome { status, endpoint, .. } = outcome;
    let mut text = match status {
        0 => format!("status unknown from {endpoint}"),
        status => format!("status {status} from {endpoint}"),
    };
    if outcome.attempts > 1 {
        text += &format!(" after {} attempts", outcome.attempts);
    }
    if let Some(ttft) = outcome.ttft_s {
        text += &format!(", first byte after {} s", number(ttft));
    }
    match outcome.not_followed {
        true => text += ", not followed to its end",
        false => text += &format!(", end after {} s", number(outcome.total_s)),
    }
    if let Some(cached) = outcome.delivered_tokens {
        text += &format!(", {} tokens from its cache", count(cached.into()));
    }
    if let Some(tokens) = outcome.completion_tokens {
        text += &format!(", {} generated", count(tokens.into()));
    }
    if let Some(error) = &outcome.error {
        text += &format!("; {error}");
    }
    text
}

/// What a reason of knowledge means, as `core::decision::Reason` documents it.
fn in_words(reason: &str) -> &str {
    match reason {
        "events-live" => "the endpoint's event stream is complete",
        "history-configured" => "the configuration asks for routing history",
        "tokens-estimated" => "the tokens are estimated, which match no engine's blocks",
        "events-not-expected" => "the endpoint has no event stream",
        "stream-initial" => "the endpoint's event stream has not spoken yet",
        "stream-replaying" => "a gap in the endpoint's event stream is being filled",
        "stream-suspect" => "the endpoint's event stream is known to be incomplete",
        "drift" => "the engine delivers less than its events promise",
        "prompt-differs" => "the engine counts other prompt tokens than the router",
        "not-configured" => "the configuration has no prefix scoring",
        "no-prompt" => "the request has no prompt that can be read",
        "no-tokenizer" => "there is no tokenizer for the model",
        "tokenizer-failed" => "the tokenizer failed",
        "prompt-too-long" => "the prompt exceeds a limit of the tokenizer",
        "no-chain" => "the prompt was not cut into blocks of the endpoint's size",
        "burst-placed" => "the configuration places requests that arrive together",
        other => other,
    }
}

fn filter_in_words(name: &str) -> &'static str {
    match name {
        "kvroute:failing" => " (have just failed to answer)",
        "kvroute:model" => " (are known to serve other models only)",
        _ => "",
    }
}

#[cfg(test)]
mod tests;
