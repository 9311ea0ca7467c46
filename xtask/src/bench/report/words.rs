//! How figures are written.

use crate::bench::{
    measurement::{Contender, Fact, Measurement},
    statistics::{Comparison, Summary},
};

/// A difference that is smaller than the noise.
pub(super) const SAME: &str = "same";

/// Three digits, or all before the point.
pub(super) fn digits(value: f64) -> String {
    match value.abs() {
        size if size >= 999.5 => {
            let sign = if value < 0.0 { "−" } else { "" };
            format!("{sign}{}", count(size.round() as u64))
        }
        size if size >= 99.95 => format!("{value:.0}"),
        size if size >= 9.995 => format!("{value:.1}"),
        size if size >= 0.1 || size == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

/// A figure that is not sampled.
pub(super) fn fact(fact: &Fact, contender: Contender) -> String {
    fact.value(contender).map_or_else(String::new, digits)
}

/// A count, with its thousands apart.
pub(super) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// The median and the quartiles.
pub(super) fn quartiles(values: &[f64]) -> String {
    Summary::of(values).map_or_else(String::new, |summary| {
        let (low, high) = summary.quartiles;
        let median = digits(summary.median);
        format!("{median} ({}–{})", digits(low), digits(high))
    })
}

/// The median, and how far the quartiles are from it.
pub(super) fn spread(values: &[f64]) -> String {
    Summary::of(values).map_or_else(String::new, |summary| {
        let (low, high) = summary.quartiles;
        let share = (high - low) / 2.0 / summary.median * 100.0;
        format!("{} ±{share:.0} %", digits(summary.median))
    })
}

pub(super) fn median(values: &[f64]) -> String {
    Summary::of(values).map_or_else(String::new, |summary| digits(summary.median))
}

/// How many times better, with the interval, or that there is nothing to tell.
pub(super) fn ratio(found: &Comparison) -> String {
    told(found, digits)
}

pub(super) fn ratio_median(found: &Comparison) -> String {
    told_median(found, digits)
}

/// How far from the floor, with the interval.
pub(super) fn distance(measurement: &Measurement, found: &Comparison) -> String {
    told(found, |value| far(measurement, value))
}

pub(super) fn distance_median(measurement: &Measurement, found: &Comparison) -> String {
    told_median(found, |value| far(measurement, value))
}

fn far(measurement: &Measurement, value: f64) -> String {
    let (value, unit) = if measurement.additive {
        (value, measurement.unit.as_str())
    } else {
        ((value - 1.0) * 100.0, "%")
    };
    let sign = if value < 0.0 { "−" } else { "+" };
    let value = value.abs();
    if value < 99.95 {
        format!("{sign}{value:.1} {unit}")
    } else {
        format!("{sign}{value:.0} {unit}")
    }
}

fn told(found: &Comparison, format: impl Fn(f64) -> String) -> String {
    match found {
        Comparison::Same(_) => SAME.to_owned(),
        Comparison::Different(summary) => {
            let (low, high) = summary.interval;
            let median = format(summary.median);
            if summary.is_confident() {
                format!("{median} ({} … {})", format(low), format(high))
            } else {
                format!("{median} (of {})", summary.count)
            }
        }
    }
}

fn told_median(found: &Comparison, format: impl Fn(f64) -> String) -> String {
    match found {
        Comparison::Same(_) => SAME.to_owned(),
        Comparison::Different(summary) => format(summary.median),
    }
}
