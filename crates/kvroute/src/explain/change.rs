//! What would have to be different for the second to win?
//!
//! One score at a time, the others as they are. Scorers compare endpoints with each other, so a
//! change of one endpoint can move the scores of others, too; and a picker that draws by chance has
//! no winner by score. Both are said.

use super::table::number;
use super::view::{Cell, Row};

/// Name of the scorer whose scores are `1 / (1 + seconds)`.
const COST: &str = "kvroute-cost-scorer";

/// The lines about one profile: whom the second would have to overtake, and how.
pub fn lines(rows: &[Row], chosen: &str) -> Vec<String> {
    let Some(first) = rows.iter().find(|row| row.endpoint == chosen) else { return Vec::new() };
    let others = rows.iter().filter(|row| row.endpoint != chosen);
    // Of equal ones the first.
    let Some(second) = others.rev().max_by(|a, b| a.total.total_cmp(&b.total)) else {
        return vec!["  No other endpoint was left to win.".to_owned()];
    };
    let gap = first.total - second.total;
    let name = &second.endpoint;
    if gap == 0.0 {
        return vec![format!("  {name} has the same total: it wins with another seed.")];
    }
    if gap < 0.0 {
        return vec![format!(
            "  {name} has {} more: the picker does not just take the best total.",
            number(-gap)
        )];
    }
    let mut lines =
        vec![format!("  {name} is second and lacks {}. It wins, all else equal,", number(gap))];
    let mut impossible = Vec::new();
    for cell in &second.scores {
        match Need::of(cell, gap) {
            Need::Raw(needed) => lines.push(format!("    if {}", condition(cell, needed))),
            Need::Impossible => impossible.push(cell.scorer.as_str()),
            Need::NoWeight => {}
        }
    }
    if lines.len() == 1 {
        let most: f64 = second.scores.iter().map(gain).sum();
        let lines_of = match most > gap {
            true => format!(
                "  {name} is second and lacks {}: no single score can make it win, several \
                 together can.",
                number(gap)
            ),
            false => format!(
                "  {name} is second and lacks {}: even with the best of every score it would gain \
                 only {}.",
                number(gap),
                number(most)
            ),
        };
        return vec![lines_of];
    }
    if !impossible.is_empty() {
        lines.push(format!("    never by {} alone", impossible.join(" or ")));
    }
    lines
}

enum Need {
    /// The score that is not enough yet: it must be passed.
    Raw(f64),
    /// Not even the best score is enough.
    Impossible,
    /// The scorer counts for nothing.
    NoWeight,
}

impl Need {
    fn of(cell: &Cell, gap: f64) -> Need {
        if cell.weight == 0.0 {
            return Need::NoWeight;
        }
        // Below 0 and above 1, scores count as these.
        let within = cell.raw.map_or(0.0, |raw| raw.clamp(0.0, 1.0));
        let needed = within + gap / cell.weight;
        // The score itself would tie: one beyond it must exist.
        let possible = if cell.weight > 0.0 { needed < 1.0 } else { needed > 0.0 };
        if possible { Need::Raw(needed) } else { Need::Impossible }
    }
}

/// The most that a score could add.
fn gain(cell: &Cell) -> f64 {
    cell.weight.max(0.0) - cell.contribution
}

fn condition(cell: &Cell, needed: f64) -> String {
    let now = cell.raw.map_or_else(|| "no data".to_owned(), number);
    let side = if cell.weight > 0.0 { "above" } else { "below" };
    let text = format!("its {} were {side} {} (now {now})", cell.scorer, number(needed));
    match (cell.scorer == COST, cell.raw) {
        (true, Some(raw)) if raw > 0.0 && needed > 0.0 => {
            let seconds = |score: f64| number(1.0 / score - 1.0);
            format!("{text},\n      a cost below {} s (now {} s)", seconds(needed), seconds(raw))
        }
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(endpoint: &str, scores: &[(&str, f64, Option<f64>)]) -> Row {
        let scores: Vec<Cell> = scores
            .iter()
            .map(|(scorer, weight, raw)| Cell {
                scorer: (*scorer).to_owned(),
                weight: *weight,
                raw: *raw,
                contribution: raw.unwrap_or(0.0) * weight,
                clamped: false,
            })
            .collect();
        let total = scores.iter().map(|cell| cell.contribution).sum();
        Row { endpoint: endpoint.into(), total, scores }
    }

    fn told(rows: &[Row]) -> String {
        lines(rows, "a").join("\n")
    }

    #[test]
    fn what_is_needed_is_computed_from_the_matrix() {
        let rows = [
            row("a", &[("prefix", 3.0, Some(0.5)), ("queue", 2.0, Some(0.5))]),
            row("b", &[("prefix", 3.0, Some(0.25)), ("queue", 2.0, Some(0.75))]),
            row("c", &[("prefix", 3.0, Some(0.0)), ("queue", 2.0, Some(0.0))]),
        ];
        assert_eq!(
            told(&rows),
            "  b is second and lacks 0.25. It wins, all else equal,\n    \
             if its prefix were above 0.3333 (now 0.25)\n    \
             if its queue were above 0.875 (now 0.75)"
        );
        // The claim holds: just above it wins, just below it does not.
        for (more, wins) in [(1e-9, true), (-1e-9, false)] {
            let total = 3.0 * (0.25 + 0.25 / 3.0 + more) + 2.0 * 0.75;
            assert_eq!(total > rows[0].total, wins);
        }
    }

    #[test]
    fn what_is_impossible_is_said() {
        let one = [
            row("a", &[("x", 3.0, Some(0.9)), ("y", 1.0, Some(1.0))]),
            row("b", &[("x", 3.0, Some(0.5)), ("y", 1.0, Some(0.3))]),
        ];
        assert!(told(&one).contains("no single score can make it win"), "{}", told(&one));
        let never = [row("a", &[("x", 1.0, Some(1.0))]), row("b", &[("x", 1.0, Some(0.5))])];
        assert!(told(&never).contains("would gain only 0.5"), "{}", told(&never));
        let beyond = [
            row("a", &[("x", 1.0, Some(1.0)), ("y", 1.0, Some(1.0))]),
            row("b", &[("x", 1.0, None), ("y", 0.0, Some(0.5))]),
        ];
        assert!(told(&beyond).contains("would gain only 1"), "{}", told(&beyond));
    }

    #[test]
    fn ties_single_candidates_and_pickers_that_draw() {
        let tie = [row("a", &[("x", 1.0, Some(0.5))]), row("b", &[("x", 1.0, Some(0.5))])];
        assert!(told(&tie).contains("another seed"));
        assert!(told(&tie[..1]).contains("No other endpoint"));
        let drawn = [row("a", &[("x", 1.0, Some(0.1))]), row("b", &[("x", 1.0, Some(0.5))])];
        assert!(told(&drawn).contains("0.4 more"), "{}", told(&drawn));
        assert_eq!(lines(&[], "a"), Vec::<String>::new());
    }

    #[test]
    fn costs_are_told_in_seconds_and_negative_weights_turn_around() {
        let rows = [
            row("a", &[("kvroute-cost-scorer", 1.0, Some(0.8))]),
            row("b", &[("kvroute-cost-scorer", 1.0, Some(0.5))]),
        ];
        assert!(told(&rows).contains("a cost below 0.25 s (now 1 s)"), "{}", told(&rows));
        let turned = [row("a", &[("x", -1.0, Some(0.25))]), row("b", &[("x", -1.0, Some(0.75))])];
        assert!(told(&turned).contains("if its x were below 0.25 (now 0.75)"), "{}", told(&turned));
    }
}
