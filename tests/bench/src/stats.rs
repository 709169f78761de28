//! Medians, and how far they can be trusted.

use fastrand::Rng;
use serde::{Deserialize, Serialize};

/// So many times the rounds are drawn anew.
const RESAMPLES: usize = 1000;

/// A median and the interval in which it lies with 95 % confidence.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The median.
    pub median: f64,
    /// The interval's lower end.
    pub low: f64,
    /// The interval's upper end.
    pub high: f64,
}

impl Estimate {
    /// Of some values, by the bootstrap percentile method; none of no values.
    #[must_use]
    pub fn of(values: &[f64]) -> Option<Self> {
        let median = median(values)?;
        // Always the same for the same values.
        let mut rng = Rng::with_seed(0x5eed);
        let mut medians: Vec<f64> = (0..RESAMPLES)
            .filter_map(|_| {
                let drawn: Vec<f64> = (0..values.len()).map(|_| values[rng.usize(..values.len())]).collect();
                self::median(&drawn)
            })
            .collect();
        medians.sort_by(f64::total_cmp);
        Some(Self { median, low: medians[RESAMPLES / 40], high: medians[RESAMPLES - 1 - RESAMPLES / 40] })
    }

    /// Of the ratios of values that were measured in the same rounds.
    #[must_use]
    pub fn of_ratio(values: &[f64], baseline: &[f64]) -> Option<Self> {
        let ratios: Vec<f64> = values.iter().zip(baseline).map(|(value, base)| value / base).collect();
        Self::of(&ratios)
    }

    /// Of the differences of values that were measured in the same rounds.
    #[must_use]
    pub fn of_difference(values: &[f64], baseline: &[f64]) -> Option<Self> {
        let differences: Vec<f64> = values.iter().zip(baseline).map(|(value, base)| value - base).collect();
        Self::of(&differences)
    }

    /// Does the interval contain this?
    #[must_use]
    pub fn contains(&self, value: f64) -> bool {
        (self.low..=self.high).contains(&value)
    }

    /// Half the interval's width, as a part of the median.
    #[must_use]
    pub fn uncertainty(&self) -> f64 {
        (self.high - self.low) / 2.0 / self.median.abs()
    }
}

/// The middle value, or the mean of the two in the middle; none of no values.
#[must_use]
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    if sorted.len().is_multiple_of(2) { Some(f64::midpoint(sorted[sorted.len() / 2 - 1], upper)) } else { Some(upper) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_known_values() {
        for (values, expected) in [
            (&[][..], None),
            (&[3.0], Some(3.0)),
            (&[4.0, 1.0], Some(2.5)),
            (&[9.0, 1.0, 2.0], Some(2.0)),
            (&[1e9, 1.0, 2.0, 3.0], Some(2.5)),
        ] {
            assert_eq!(median(values), expected, "{values:?}");
        }
    }

    #[test]
    fn constant_values_leave_no_doubt() {
        let estimate = Estimate::of(&[5.0; 20]);
        assert_eq!(estimate, Some(Estimate { median: 5.0, low: 5.0, high: 5.0 }));
    }

    /// For 1 to 101 the order statistics' binomial interval is 41 to 61: the bootstrap's must be close to it.
    #[test]
    fn the_interval_of_known_values() {
        let values: Vec<f64> = (1..=101).map(f64::from).collect();
        let Estimate { median, low, high } = Estimate::of(&values).expect("there are values");
        assert_eq!(median, 51.0);
        assert!((38.0..=44.0).contains(&low) && (58.0..=64.0).contains(&high), "{low} to {high}");
    }

    /// 95 of 100 intervals should contain the true median; 90 is far from chance for a method that is right.
    #[test]
    fn intervals_cover_the_true_median() {
        let mut rng = Rng::with_seed(3);
        let covered = (0..200)
            .filter(|_| {
                // Skewed, as measured times are; the median is ln 2.
                let values: Vec<f64> = (0..40).map(|_| -(1.0 - rng.f64()).ln()).collect();
                Estimate::of(&values).is_some_and(|estimate| estimate.contains(std::f64::consts::LN_2))
            })
            .count();
        assert!((180..=199).contains(&covered), "{covered} of 200");
    }

    /// The machine slows down to a third in the middle: ratios taken round by round do not notice.
    #[test]
    fn ratios_withstand_drift() {
        let baseline: Vec<f64> = (0..40).map(|round| if round < 20 { 100.0 } else { 300.0 }).collect();
        let values: Vec<f64> =
            baseline.iter().enumerate().map(|(round, base)| base * (1.49 + 0.02 * (round % 2) as f64)).collect();
        let ratio = Estimate::of_ratio(&values, &baseline).expect("there are values");
        assert!(ratio.contains(1.5) && ratio.uncertainty() < 0.02, "{ratio:?}");
        assert!(Estimate::of(&values).expect("there are values").uncertainty() > 0.1);
    }
}
