//! What was measured: values of every contender, taken in turn.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::statistics::Comparison;

/// Who is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Contender {
    /// bpf-bridge as its defaults make it.
    BpfBridge,
    /// bpf-bridge with XDP on the uplink (`xdpUplinks`). It takes part where packets come
    /// from outside.
    Xdp,
    /// bpf-bridge that masquerades past netfilter (`"netfilter": "none"`). It takes part
    /// where packets leave the node.
    NoNetfilter,
    /// The stock plugins bridge, host-local, portmap and firewall.
    Stock,
    /// What cannot be beaten: a veth pair from namespace to namespace for packets, the
    /// bare netlink requests for ADD and DEL.
    Floor,
}

impl Contender {
    /// As it is called in tables.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::BpfBridge => "bpf-bridge",
            Self::Xdp => "bpf-bridge, XDP",
            Self::NoNetfilter => "bpf-bridge, no netfilter",
            Self::Stock => "stock",
            Self::Floor => "floor",
        }
    }

    /// What makes it another one than bpf-bridge with its defaults.
    pub(super) fn kind(self) -> &'static str {
        let name = self.name();
        name.strip_prefix("bpf-bridge, ").unwrap_or(name)
    }

    /// Whether it is bpf-bridge, in whatever way it is configured.
    pub(super) fn is_ours(self) -> bool {
        matches!(self, Self::BpfBridge | Self::Xdp | Self::NoNetfilter)
    }
}

/// Which values are the good ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Better {
    Lower,
    Higher,
}

/// What a cost may grow with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Axis {
    /// Pods on the node.
    Pods,
    /// Published ports on the node.
    Ports,
}

/// A point of a curve: what one measurement is among those of its kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Point {
    /// The name that all measurements of the curve have, as in "ADD alone".
    pub(super) curve: String,
    pub(super) axis: Axis,
    /// So many pods or ports.
    pub(super) at: u64,
}

/// What a transaction, a packet or a connection took of the CPU, in µs: of the whole run,
/// by the accounts that the kernel keeps of the CPU on which both ends run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Cpu {
    pub(super) user: f64,
    pub(super) system: f64,
    pub(super) softirq: f64,
}

/// One property, measured of some contenders in turn.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Measurement {
    /// What it is, as in "pod to pod, TCP_RR, IPv4".
    pub(super) name: String,
    /// What it is measured in.
    pub(super) unit: String,
    pub(super) better: Better,
    /// The distance to the floor is told in the unit, not as a share.
    pub(super) additive: bool,
    /// Where it lies on a curve.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) point: Option<Point>,
    /// The values at the same place in each list were taken one after another.
    #[serde(with = "by_contender")]
    pub(super) values: Vec<(Contender, Vec<f64>)>,
    /// What it took of the CPU, where that was read.
    #[serde(
        rename = "cpuMicroseconds",
        with = "by_contender",
        default,
        skip_serializing_if = "Vec::is_empty"
    )]
    pub(super) cpu: Vec<(Contender, Cpu)>,
    /// How long each single transaction took: parts of 1 (0.5 is the median), and µs.
    #[serde(
        rename = "latencyMicroseconds",
        with = "by_contender",
        default,
        skip_serializing_if = "Vec::is_empty"
    )]
    pub(super) latencies: Vec<(Contender, Vec<(f64, f64)>)>,
}

/// A figure that is not sampled: the size of a file, the memory of a table.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Fact {
    pub(super) name: String,
    pub(super) unit: String,
    #[serde(with = "by_contender")]
    pub(super) values: Vec<(Contender, f64)>,
}

impl Fact {
    pub(super) fn value(&self, contender: Contender) -> Option<f64> {
        let mut values = self.values.iter();
        values
            .find(|(of, _)| *of == contender)
            .map(|(_, value)| *value)
    }
}

impl Measurement {
    /// One that has nothing but values yet.
    pub(super) fn new(
        name: impl Into<String>,
        unit: &str,
        better: Better,
        values: Vec<(Contender, Vec<f64>)>,
    ) -> Self {
        Self {
            name: name.into(),
            unit: unit.to_owned(),
            better,
            additive: false,
            point: None,
            values,
            cpu: Vec::new(),
            latencies: Vec::new(),
        }
    }

    /// The same, whose distance to the floor is told in the unit.
    pub(super) fn additive(self) -> Self {
        Self {
            additive: true,
            ..self
        }
    }

    /// The same, as a point of a curve.
    pub(super) fn at(self, curve: &str, axis: Axis, at: usize) -> Self {
        let point = Point {
            curve: curve.to_owned(),
            axis,
            at: at as u64,
        };
        Self {
            point: Some(point),
            ..self
        }
    }

    pub(super) fn values(&self, contender: Contender) -> &[f64] {
        self.values
            .iter()
            .find(|(of, _)| *of == contender)
            .map_or(&[], |(_, values)| values)
    }

    /// How many times better bpf-bridge is than the stock plugins.
    pub(super) fn advantage(&self) -> Option<Comparison> {
        self.advantage_of(Contender::BpfBridge)
    }

    /// How many times better another contender is than the stock plugins.
    pub(super) fn advantage_of(&self, contender: Contender) -> Option<Comparison> {
        let ours = self.values(contender);
        let stock = self.values(Contender::Stock);
        match self.better {
            Better::Lower => Comparison::ratio(stock, ours),
            Better::Higher => Comparison::ratio(ours, stock),
        }
    }

    /// How far bpf-bridge is from the floor: in the unit, or as a ratio that is
    /// below 1 where it is worse.
    pub(super) fn distance(&self) -> Option<Comparison> {
        self.distance_of(Contender::BpfBridge)
    }

    /// How far another contender is from the floor.
    pub(super) fn distance_of(&self, contender: Contender) -> Option<Comparison> {
        let ours = self.values(contender);
        let floor = self.values(Contender::Floor);
        match (self.additive, self.better) {
            (true, _) => Comparison::difference(ours, floor),
            (false, Better::Lower) => Comparison::ratio(floor, ours),
            (false, Better::Higher) => Comparison::ratio(ours, floor),
        }
    }
}

/// What there is of each contender is an object in JSON, with a key for each.
mod by_contender {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::Contender;

    pub(super) fn serialize<T: Serialize, S: Serializer>(
        values: &[(Contender, T)],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_map(values.iter().map(|(contender, value)| (contender, value)))
    }

    pub(super) fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<(Contender, T)>, D::Error> {
        let values = BTreeMap::deserialize(deserializer)?;
        Ok(values.into_iter().collect())
    }
}
