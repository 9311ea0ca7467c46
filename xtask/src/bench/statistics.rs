//! Medians, their intervals, and comparisons of samples taken in turn.

/// What a sample is summed up by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Summary {
    /// Half of the values are below.
    pub(super) median: f64,
    /// The quartiles: half of the values lie between them.
    pub(super) quartiles: (f64, f64),
    /// Where the true median lies with a confidence of at least 95 %; all of them if they
    /// are too few to say.
    pub(super) interval: (f64, f64),
    /// How many values there are.
    pub(super) count: usize,
}

impl Summary {
    /// Sums up `values`; `None` if there are none.
    pub(super) fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (lowest, highest) = (*sorted.first()?, *sorted.last()?);
        let interval = match outliers(sorted.len()) {
            Some(rank) => (sorted[rank], sorted[sorted.len() - 1 - rank]),
            // Too few for that confidence: no narrower than what was seen.
            None => (lowest, highest),
        };
        Some(Self {
            median: quantile(&sorted, 0.5),
            quartiles: (quantile(&sorted, 0.25), quantile(&sorted, 0.75)),
            interval,
            count: sorted.len(),
        })
    }

    /// Whether the interval has its confidence.
    pub(super) fn is_confident(&self) -> bool {
        outliers(self.count).is_some()
    }
}

/// A value between two of `sorted` is interpolated.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let position = share * (sorted.len() - 1) as f64;
    let (below, above) = (position.floor() as usize, position.ceil() as usize);
    sorted[below] + (sorted[above] - sorted[below]) * position.fract()
}

/// How many values may be left out at either end of `count` sorted ones so that
/// the rest still spans the median with a confidence of 95 %.
///
/// Each value is below the median with probability 1/2, whatever the
/// distribution: the tail of a binomial distribution is summed up to 2.5 %.
fn outliers(count: usize) -> Option<usize> {
    let mut term = 0.5_f64.powi(i32::try_from(count).unwrap_or(i32::MAX));
    let mut tail = 0.0;
    let mut rank = None;
    for below in 0..count / 2 {
        tail += term;
        if tail > 0.025 {
            break;
        }
        rank = Some(below);
        term *= (count - below) as f64 / (below + 1) as f64;
    }
    rank
}

/// How one contender compares with another, from values that were taken in
/// pairs, one right after the other: what disturbs the machine disturbs both.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Comparison {
    /// The difference is smaller than the noise.
    Same(Summary),
    /// The paired ratios, first to second.
    Different(Summary),
}

impl Comparison {
    /// The ratios of `first` to `second`, pair by pair.
    pub(super) fn ratio(first: &[f64], second: &[f64]) -> Option<Self> {
        Self::paired(first, second, 1.0, |a, b| a / b)
    }

    /// The differences of `first` and `second`, pair by pair.
    pub(super) fn difference(first: &[f64], second: &[f64]) -> Option<Self> {
        Self::paired(first, second, 0.0, |a, b| a - b)
    }

    fn paired(
        first: &[f64],
        second: &[f64],
        neutral: f64,
        compare: impl Fn(f64, f64) -> f64,
    ) -> Option<Self> {
        let pairs: Vec<f64> = first
            .iter()
            .zip(second)
            .map(|(&a, &b)| compare(a, b))
            .collect();
        let summary = Summary::of(&pairs)?;
        let (low, high) = summary.interval;
        Some(if low <= neutral && neutral <= high {
            Self::Same(summary)
        } else {
            Self::Different(summary)
        })
    }

    /// The same told in another way, which must keep the order.
    pub(super) fn map(self, tell: impl Fn(f64) -> f64) -> Self {
        let both = |(low, high)| (tell(low), tell(high));
        let told = |summary: Summary| Summary {
            median: tell(summary.median),
            quartiles: both(summary.quartiles),
            interval: both(summary.interval),
            count: summary.count,
        };
        match self {
            Self::Same(summary) => Self::Same(told(summary)),
            Self::Different(summary) => Self::Different(told(summary)),
        }
    }

    /// The ratios or differences, whether they mean anything or not.
    pub(super) fn summary(&self) -> &Summary {
        match self {
            Self::Same(summary) | Self::Different(summary) => summary,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_interpolated() {
        let summary = Summary::of(&[4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!(summary.median, 2.5);
        assert_eq!(summary.quartiles, (1.75, 3.25));
        assert_eq!(Summary::of(&[7.0]).unwrap().median, 7.0);
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn the_interval_of_the_median_is_that_of_the_sign_test() {
        // Tables of the sign test (two-sided, 5 %).
        for (count, rank) in [
            (5, None),
            (6, Some(0)),
            (9, Some(1)),
            (12, Some(2)),
            (20, Some(5)),
        ] {
            assert_eq!(outliers(count), rank, "{count}");
        }
        assert!(!Summary::of(&[1.0; 5]).unwrap().is_confident());
        assert!(Summary::of(&[1.0; 6]).unwrap().is_confident());
        let values: Vec<f64> = (0..20).map(f64::from).collect();
        assert_eq!(Summary::of(&values).unwrap().interval, (5.0, 14.0));
    }

    #[test]
    fn a_difference_below_the_noise_is_none() {
        let noise = [1.0, 1.2, 0.9, 1.1, 0.8, 1.0, 1.3, 0.7];
        let other = [1.1, 1.0, 1.0, 1.0, 0.9, 1.1, 1.1, 0.9];
        assert!(matches!(
            Comparison::ratio(&noise, &other),
            Some(Comparison::Same(_))
        ));
        let twice = noise.map(|value| value * 2.0);
        let Some(Comparison::Different(ratio)) = Comparison::ratio(&twice, &noise) else {
            panic!("not told apart");
        };
        assert_eq!(ratio.median, 2.0);
        let Some(Comparison::Different(difference)) = Comparison::difference(&twice, &noise) else {
            panic!("not told apart");
        };
        assert!((difference.median - 1.0).abs() < 0.01);
    }
}
