//! Medians, and how far they can be trusted.

use fastrand::Rng;
use serde::{Deserialize, Serialize};

/// Number of bootstrap resamplings.
const RESAMPLES: usize = 1000;
/// Half width of the 95 % interval of a normal distribution, in standard deviations.
const NORMAL: f64 = 1.96;
/// No null is surer than this, as a standard deviation: a few rounds may agree by chance.
const SUREST: f64 = 1e-3;

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
    /// Of some values in the order of their rounds, by the bootstrap percentile method; none of no values. Rounds are drawn
    /// in blocks of neighbours, which have more in common than others have.
    #[must_use]
    pub fn of(values: &[f64]) -> Option<Self> {
        let median = median(values)?;
        // Always the same for the same values.
        let mut rng = Rng::with_seed(0x5eed);
        // The usual length, which grows with the third root of their number.
        let block = (1..).take_while(|length| length * length * length <= values.len()).last().unwrap_or(1);
        let mut medians: Vec<f64> = (0..RESAMPLES)
            .filter_map(|_| {
                let blocks = values.len().div_ceil(block);
                let starts = (0..blocks).map(|_| rng.usize(..values.len()));
                let rounds = starts.flat_map(|start| (start..start + block).map(|round| round % values.len()));
                let drawn: Vec<f64> = rounds.take(values.len()).map(|round| values[round]).collect();
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

    /// The difference to another, measured apart from this.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        let median = self.median - other.median;
        let low = median - (self.median - self.low).hypot(other.high - other.median);
        let high = median + (self.high - self.median).hypot(other.median - other.low);
        Self { median, low, high }
    }

    /// Does the interval contain this?
    #[must_use]
    pub fn contains(&self, value: f64) -> bool {
        (self.low..=self.high).contains(&value)
    }

    /// With the interval as wide as it has to be where the two that were compared stood in different places, which differ
    /// by [`place_noise`]. For ratios.
    #[must_use]
    pub fn widened(self, noise: f64) -> Self {
        let away = |end: f64| (end / self.median).ln().hypot(NORMAL * noise).exp();
        Self { median: self.median, low: self.median / away(self.low), high: self.median * away(self.high) }
    }

    /// Half the interval's width, as a part of the median.
    #[must_use]
    pub fn uncertainty(&self) -> f64 {
        (self.high - self.low) / 2.0 / self.median.abs()
    }
}

/// By how much a ratio is off because two contestants' devices, namespaces and programs lie elsewhere in memory: more
/// rounds do not help against that. The standard deviation of the ratio's logarithm, from the ratios of a contestant to
/// itself in another place; larger where these are few, as Student's distribution is wider.
#[must_use]
pub fn place_noise(nulls: &[Estimate]) -> f64 {
    if nulls.is_empty() {
        return 0.0;
    }
    let count = nulls.len() as f64;
    // DerSimonian and Laird's estimate of what differs between studies, with the true effect known to be none: each null
    // counts as much as its rounds are sure of it, or wide intervals would hide what narrow ones show.
    let weights = nulls.iter().map(|null| ((null.high / null.low).ln() / 2.0 / NORMAL).max(SUREST).powi(-2));
    let (weight, squares) = nulls
        .iter()
        .zip(weights)
        .fold((0.0, 0.0), |(sum, squares), (null, weight)| (sum + weight, squares + weight * null.median.ln().powi(2)));
    let variance = (squares - count) / weight;
    variance.max(0.0).sqrt() * (1.0 + 1.6 / count)
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
        let mut values: Vec<f64> = (1..=101).map(f64::from).collect();
        Rng::with_seed(2).shuffle(&mut values);
        let Estimate { median, low, high } = Estimate::of(&values).expect("there are values");
        assert_eq!(median, 51.0);
        assert!((38.0..=44.0).contains(&low) && (58.0..=64.0).contains(&high), "{low} to {high}");
    }

    /// In this order neighbours are alike, and 101 rounds tell less than they seem to.
    #[test]
    fn the_interval_is_wider_where_neighbouring_rounds_are_alike() {
        let mut values: Vec<f64> = (1..=101).map(f64::from).collect();
        let alike = Estimate::of(&values).expect("there are values");
        Rng::with_seed(2).shuffle(&mut values);
        let shuffled = Estimate::of(&values).expect("there are values");
        assert!(alike.uncertainty() > 1.4 * shuffled.uncertainty(), "{alike:?} {shuffled:?}");
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

    /// Known ratios, measured as on a machine: noise that neighbouring rounds share, and places that differ by 3 %. The
    /// rounds alone make intervals that are too narrow; with what the null pairs tell, 95 of 100 contain the truth.
    #[test]
    fn intervals_cover_the_true_ratio_although_places_differ() {
        let mut rng = Rng::with_seed(11);
        let normal = |rng: &mut Rng| (0..12).map(|_| rng.f64()).sum::<f64>() - 6.0;
        let mut measure = |truth: f64| {
            let (place, mut shared) = (0.03 * normal(&mut rng), 0.0);
            let ratios: Vec<f64> = (0..30)
                .map(|_| {
                    shared = 0.4 * shared + 0.02 * normal(&mut rng);
                    truth * (place + shared + 0.02 * normal(&mut rng)).exp()
                })
                .collect();
            Estimate::of(&ratios).expect("there are values")
        };
        let (mut narrow, mut honest, mut runs) = (0, 0, 0);
        for _ in 0..20 {
            let nulls: Vec<Estimate> = (0..12).map(|_| measure(1.0)).collect();
            let noise = place_noise(&nulls);
            for _ in 0..20 {
                let ratio = measure(1.7);
                runs += 1;
                narrow += u32::from(ratio.contains(1.7));
                honest += u32::from(ratio.widened(noise).contains(1.7));
            }
        }
        assert!(narrow * 100 < 60 * runs, "{narrow} of {runs} without the places' noise");
        assert!(honest * 100 > 92 * runs && honest < runs, "{honest} of {runs} with it");
    }

    #[test]
    fn places_that_do_not_differ_widen_nothing() {
        let exact = Estimate { median: 1.0, low: 0.99, high: 1.01 };
        assert_eq!(place_noise(&[exact; 5]), 0.0);
        assert_eq!(place_noise(&[]), 0.0);
        let wide = Estimate { median: 2.0, low: 1.0, high: 4.0 }.widened(0.0);
        assert!((wide.low - 1.0).abs() < 1e-9 && (wide.high - 4.0).abs() < 1e-9, "{wide:?}");
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
