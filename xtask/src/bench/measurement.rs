//! What was measured: values of every contender, taken in turn.

use clap::ValueEnum;
use serde_json::{Value, json};

use super::statistics::{Comparison, Summary};

/// Who is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Contender {
    /// bpf-bridge with its embedded address store.
    BpfBridge,
    /// The stock plugins bridge and host-local.
    Stock,
    /// What cannot be beaten: a veth pair from namespace to namespace for
    /// packets, the netlink requests that make and delete one for ADD and DEL.
    Floor,
}

impl Contender {
    /// As it is called in tables.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::BpfBridge => "bpf-bridge",
            Self::Stock => "stock",
            Self::Floor => "floor",
        }
    }
}

/// Which values are the good ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Better {
    Lower,
    Higher,
}

/// One property, measured of some contenders in turn.
#[derive(Clone, Debug)]
pub(super) struct Measurement {
    /// What it is, as in "ADD, 100 pods".
    pub(super) name: String,
    /// What it is measured in.
    pub(super) unit: &'static str,
    pub(super) better: Better,
    /// The distance to the floor is told in the unit, not as a share.
    pub(super) additive: bool,
    /// The values at the same place in each list were taken one after another.
    pub(super) values: Vec<(Contender, Vec<f64>)>,
}

impl Measurement {
    pub(super) fn values(&self, contender: Contender) -> &[f64] {
        self.values
            .iter()
            .find(|(of, _)| *of == contender)
            .map_or(&[], |(_, values)| values)
    }

    /// How many times better bpf-bridge is than the stock plugins.
    pub(super) fn advantage(&self) -> Option<Comparison> {
        let ours = self.values(Contender::BpfBridge);
        let stock = self.values(Contender::Stock);
        match self.better {
            Better::Lower => Comparison::ratio(stock, ours),
            Better::Higher => Comparison::ratio(ours, stock),
        }
    }

    /// How far bpf-bridge is from the floor: in the unit, or as a ratio that is
    /// below 1 where it is worse.
    pub(super) fn distance(&self) -> Option<Comparison> {
        let ours = self.values(Contender::BpfBridge);
        let floor = self.values(Contender::Floor);
        match (self.additive, self.better) {
            (true, _) => Comparison::difference(ours, floor),
            (false, Better::Lower) => Comparison::ratio(floor, ours),
            (false, Better::Higher) => Comparison::ratio(ours, floor),
        }
    }

    pub(super) fn to_json(&self) -> Value {
        let contenders: serde_json::Map<String, Value> = self
            .values
            .iter()
            .filter_map(|(contender, values)| {
                let summary = Summary::of(values)?;
                let text = json!({"median": summary.median, "quartiles": [summary.quartiles.0, summary.quartiles.1],
                    "interval95": [summary.interval.0, summary.interval.1], "samples": values});
                Some((contender.name().to_owned(), text))
            })
            .collect();
        json!({
            "name": self.name,
            "unit": self.unit,
            "better": match self.better { Better::Lower => "lower", Better::Higher => "higher" },
            "contenders": contenders,
            "timesBetterThanStock": self.advantage().map(|found| comparison(&found)),
            (if self.additive { "differenceToFloor" } else { "shareOfFloor" }):
                self.distance().map(|found| comparison(&found)),
        })
    }
}

fn comparison(found: &Comparison) -> Value {
    let summary = found.summary();
    json!({
        "median": summary.median,
        "interval95": [summary.interval.0, summary.interval.1],
        "aboveNoise": matches!(found, Comparison::Different(_)),
    })
}
