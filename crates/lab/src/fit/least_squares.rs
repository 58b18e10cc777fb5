//! Which non-negative coefficients explain the measurements best?
//!
//! There are few coefficients, so every subset of them is tried: the best non-negative solution is
//! the unconstrained one of some subset, and nothing has to converge.

/// Most coefficients: the subsets are 2 to the power of this.
pub(super) const COLUMNS_MAX: usize = 8;

/// A share of a column's length below which what other columns do not explain of it counts as
/// nothing: the data cannot tell them apart.
const INDEPENDENT_MIN: f64 = 0.01;

/// A solution.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Solution {
    /// The coefficients.
    pub values: Vec<f64>,
    /// Their standard errors, as far as the scatter of the measurements tells; 0 where a
    /// coefficient was held at 0.
    pub errors: Vec<f64>,
}

/// Of columns in order of importance, those that the ones before do not explain.
pub(super) fn independent(columns: &[Vec<f64>]) -> Vec<bool> {
    let mut basis: Vec<Vec<f64>> = Vec::new();
    columns
        .iter()
        .map(|column| {
            let length = dot(column, column).sqrt();
            let mut rest = column.clone();
            // Twice, because one pass loses digits where columns are nearly parallel.
            for _ in 0..2 {
                for unit in &basis {
                    let share = dot(&rest, unit);
                    rest.iter_mut().zip(unit).for_each(|(value, unit)| *value -= share * unit);
                }
            }
            let left = dot(&rest, &rest).sqrt();
            let own = left > INDEPENDENT_MIN * length && left > 0.0;
            if own {
                basis.push(rest.iter().map(|value| value / left).collect());
            }
            own
        })
        .collect()
}

/// The non-negative coefficients with the least sum of squares. Columns must be independent.
pub(super) fn solve(columns: &[Vec<f64>], target: &[f64]) -> Solution {
    let count = columns.len().min(COLUMNS_MAX);
    let scales: Vec<f64> = columns
        .iter()
        .map(|column| Some(dot(column, column).sqrt()).filter(|&x| x > 0.0).unwrap_or(1.0))
        .collect();
    let mut gram = vec![vec![0.0; count]; count];
    let mut right = vec![0.0; count];
    for i in 0..count {
        right[i] = dot(&columns[i], target) / scales[i];
        for j in 0..count {
            gram[i][j] = dot(&columns[i], &columns[j]) / (scales[i] * scales[j]);
        }
    }
    let total = dot(target, target);
    let mut best = (total, Vec::new(), Vec::new());
    for subset in 1_u32..1 << count {
        let chosen: Vec<usize> = (0..count).filter(|i| subset >> i & 1 == 1).collect();
        let Some(factor) = Factor::of(&gram, &chosen) else { continue };
        let values = factor.solve(chosen.iter().map(|&i| right[i]).collect());
        if values.iter().any(|&value| value < 0.0) {
            continue;
        }
        let explained: f64 = values.iter().zip(&chosen).map(|(x, &i)| x * right[i]).sum();
        if total - explained < best.0 {
            best = (total - explained, chosen, values);
        }
    }
    let (left, chosen, values) = best;
    let freedom = target.len().saturating_sub(chosen.len()).max(1) as f64;
    let variance = left.max(0.0) / freedom;
    let mut solution = Solution { values: vec![0.0; count], errors: vec![0.0; count] };
    let factor = Factor::of(&gram, &chosen);
    for (at, (&i, value)) in chosen.iter().zip(values).enumerate() {
        let mut unit = vec![0.0; chosen.len()];
        unit[at] = 1.0;
        let inverse = factor.as_ref().map_or(0.0, |factor| factor.solve(unit)[at]);
        solution.values[i] = value / scales[i];
        solution.errors[i] = (variance * inverse.max(0.0)).sqrt() / scales[i];
    }
    solution
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Cholesky factor of a part of a Gram matrix.
struct Factor(Vec<Vec<f64>>);

impl Factor {
    /// `None` when the chosen columns are not independent.
    fn of(gram: &[Vec<f64>], chosen: &[usize]) -> Option<Factor> {
        let mut lower = vec![vec![0.0; chosen.len()]; chosen.len()];
        for i in 0..chosen.len() {
            for j in 0..=i {
                let known = dot(&lower[i][..j], &lower[j][..j]);
                let rest = gram[chosen[i]][chosen[j]] - known;
                lower[i][j] = match i == j {
                    true if rest <= 1e-12 => return None,
                    true => rest.sqrt(),
                    false => rest / lower[j][j],
                };
            }
        }
        Some(Factor(lower))
    }

    fn solve(&self, mut right: Vec<f64>) -> Vec<f64> {
        let lower = &self.0;
        for i in 0..right.len() {
            right[i] = (right[i] - dot(&lower[i][..i], &right[..i])) / lower[i][i];
        }
        for i in (0..right.len()).rev() {
            let above: f64 = (i + 1..right.len()).map(|j| lower[j][i] * right[j]).sum();
            right[i] = (right[i] - above) / lower[i][i];
        }
        right
    }
}

#[cfg(test)]
mod tests {
    use kvroute_core::Rng;

    use super::*;

    fn cost(columns: &[Vec<f64>], target: &[f64], values: &[f64]) -> f64 {
        (0..target.len())
            .map(|row| {
                let sum: f64 = columns.iter().zip(values).map(|(c, x)| c[row] * x).sum();
                (sum - target[row]).powi(2)
            })
            .sum()
    }

    #[test]
    fn no_non_negative_neighbour_is_better() {
        for seed in 0..50 {
            let mut rng = Rng::seeded(seed);
            let columns: Vec<Vec<f64>> =
                (0..4).map(|_| (0..9).map(|_| rng.next_f64() - 0.3).collect()).collect();
            let target: Vec<f64> = (0..9).map(|_| rng.next_f64() - 0.5).collect();
            let solution = solve(&columns, &target);
            assert!(solution.values.iter().all(|&value| value >= 0.0), "seed {seed}");
            let least = cost(&columns, &target, &solution.values);
            for _ in 0..200 {
                let other: Vec<f64> = solution
                    .values
                    .iter()
                    .map(|value| (value + 0.1 * (rng.next_f64() - 0.5)).max(0.0))
                    .collect();
                assert!(cost(&columns, &target, &other) >= least - 1e-12, "seed {seed}");
            }
        }
    }

    #[test]
    fn columns_that_others_explain_are_found() {
        let (a, b) = (vec![1.0, 1.0, 1.0], vec![1.0, 2.0, 3.0]);
        let sum = vec![3.0, 4.0, 5.0];
        let found = independent(&[a.clone(), b.clone(), sum, vec![0.0; 3], vec![0.0, 1.0, 0.0]]);
        assert_eq!(found, [true, true, false, false, true]);
        let solution = solve(&[a, b], &[5.0, 8.0, 11.0]);
        assert!((solution.values[0] - 2.0).abs() < 1e-9 && (solution.values[1] - 3.0).abs() < 1e-9);
        assert!(solution.errors.iter().all(|&error| error < 1e-6));
    }
}
