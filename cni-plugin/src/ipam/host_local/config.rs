//! The configuration of `host-local`, as the stock plugin reads it.
//!
//! Keys are matched in any case, as Go's decoder does, and unknown keys are left alone.

use std::{
    fs::OpenOptions,
    io::{self, Read as _},
    net::IpAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use nix::fcntl::OFlag;
use serde_json::{Map, Value};
use thiserror::Error;

use super::range::{Range, RangeError, RangeSet};
use crate::cni::result::{Dns, Route};

/// Where leases are kept when `ipam.dataDir` says nothing.
pub const DEFAULT_DATA_DIR: &str = "/var/lib/cni/networks";

/// More of a resolver configuration than this is not read, in bytes.
const RESOLV_CONF_MAX: u64 = 1 << 20;

/// What is wrong with a configuration.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// A value that does not fit its key.
    #[error("{key} is {value}: it must be {expected}")]
    Invalid {
        /// Path of the key, such as `ipam.ranges[0][1].subnet`.
        key: String,
        /// The value, as JSON.
        value: String,
        /// What would be right.
        expected: &'static str,
    },
    /// Neither `ranges` nor `subnet`, nor the capability `ipRanges`.
    #[error("no IP ranges specified: ipam needs \"ranges\" or \"subnet\"")]
    NoRanges,
    /// A set of ranges is not one.
    #[error("invalid range set {set}: {source}")]
    RangeSet {
        /// Index of the set, after the capability's and the legacy range were put first.
        set: usize,
        /// What is wrong with it.
        source: RangeError,
    },
    /// An address would be in two sets.
    #[error("range set {0} overlaps with {1}")]
    Overlap(usize, usize),
    /// Results before 0.3.0 have room for one address per family.
    #[error(
        "CNI version {0} does not support more than 1 address per family: use one range set per family or cniVersion 0.3.0 or later"
    )]
    OnePerFamily(String),
    /// `resolvConf` cannot be read.
    #[error("reading ipam.resolvConf {path:?}: {source}")]
    ResolvConf {
        /// As configured.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// What the runtime asks for besides the `ipam` object; all of it is parsed by
/// [`Config::parse`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Requests<'a> {
    /// `IP` of CNI_ARGS: one address, or several separated by commas as Multus writes them.
    pub cni_args_ip: Option<&'a str>,
    /// `args.cni.ips`
    pub args_ips: Option<&'a Value>,
    /// `runtimeConfig.ips` (capability `ips`)
    pub runtime_ips: Option<&'a Value>,
    /// `runtimeConfig.ipRanges` (capability `ipRanges`)
    pub ip_ranges: Option<&'a Value>,
}

impl<'a> Requests<'a> {
    /// Picks them out of a whole network configuration.
    #[must_use]
    pub fn from_network(network: &'a Value, cni_args_ip: Option<&'a str>) -> Self {
        let runtime = field(network, "runtimeConfig");
        let args = field(network, "args").and_then(|args| field(args, "cni"));
        Self {
            cni_args_ip,
            args_ips: args.and_then(|args| field(args, "ips")),
            runtime_ips: runtime.and_then(|runtime| field(runtime, "ips")),
            ip_ranges: runtime.and_then(|runtime| field(runtime, "ipRanges")),
        }
    }
}

/// A configuration that was checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where leases are kept; absolute.
    pub data_dir: PathBuf,
    /// Routes to hand on in the result.
    pub routes: Vec<Route>,
    /// The resolver configuration for [`Config::dns`].
    pub resolv_conf: Option<PathBuf>,
    pub(super) sets: Vec<RangeSet>,
    pub(super) requested: Vec<IpAddr>,
}

impl Config {
    /// Reads the `ipam` object and what the runtime asks for.
    ///
    /// The range sets of the capability `ipRanges` come first, then the legacy range
    /// (`subnet`, `rangeStart`, `rangeEnd`, `gateway` beside `ranges`), then `ranges`.
    /// Without `subnet` the other three legacy keys mean nothing, as in the stock plugin.
    ///
    /// `cni_version` is the configuration's; empty means 0.1.0.
    ///
    /// # Errors
    /// The first fault found; it names the key.
    pub fn parse(
        ipam: &Value,
        requests: Requests<'_>,
        cni_version: &str,
    ) -> Result<Self, ConfigError> {
        let key = Key::root("ipam");
        let object = key.object(ipam)?;

        let mut sets = Vec::new();
        if let Some(ranges) = requests.ip_ranges {
            // The specification has lists of ranges; containerd's go-cni sends the ranges alone.
            let key = Key::root("runtimeConfig.ipRanges");
            for (index, set) in key.array(ranges)?.iter().enumerate() {
                sets.push(match set {
                    Value::Object(_) => vec![range(&key.at(index), set)],
                    _ => ranges_of(&key.at(index), set)?,
                });
            }
        }
        if get(object, "subnet").is_some() {
            sets.push(vec![range(&key, ipam)]);
        }
        if let Some(ranges) = get(object, "ranges") {
            let key = key.join("ranges");
            for (index, set) in key.array(ranges)?.iter().enumerate() {
                sets.push(ranges_of(&key.at(index), set)?);
            }
        }
        let sets = sets
            .into_iter()
            .enumerate()
            .map(|(set, ranges)| {
                let in_set = |source| ConfigError::RangeSet { set, source };
                let ranges: Result<Vec<_>, _> = ranges
                    .into_iter()
                    .map(|range| range?.map_err(in_set))
                    .collect();
                RangeSet::new(ranges?).map_err(in_set)
            })
            .collect::<Result<Vec<_>, _>>()?;
        check_sets(&sets, cni_version)?;

        let mut requested = Vec::new();
        if let Some(list) = requests.cni_args_ip {
            let key = Key::root("IP in CNI_ARGS");
            for address in list.split(',').filter(|address| !address.is_empty()) {
                requested.push(key.address(&Value::from(address))?);
            }
        }
        for (name, list) in [
            ("args.cni.ips", requests.args_ips),
            ("runtimeConfig.ips", requests.runtime_ips),
        ] {
            let key = Key::root(name);
            for (index, address) in key.optional_array(list)?.iter().enumerate() {
                requested.push(key.at(index).address(address)?);
            }
        }
        // Asked for twice, over two ways, is asked for once.
        let mut seen = Vec::new();
        requested.retain(|address| {
            !seen.contains(address) && {
                seen.push(*address);
                true
            }
        });

        let routes_key = key.join("routes");
        let routes = routes_key
            .optional_array(get(object, "routes"))?
            .iter()
            .enumerate()
            .map(|(index, value)| route(&routes_key.at(index), value))
            .collect::<Result<_, _>>()?;

        Ok(Self {
            data_dir: data_dir(ipam)?,
            routes,
            resolv_conf: key.string(object, "resolvConf")?.map(PathBuf::from),
            sets,
            requested,
        })
    }

    /// The range sets; an attachment gets one address of each.
    #[must_use]
    pub fn range_sets(&self) -> &[RangeSet] {
        &self.sets
    }

    /// Reads the file that `resolvConf` names; without one, nothing is set.
    ///
    /// Only ADD needs it, so a file that is missing does not stand in DEL's way.
    ///
    /// # Errors
    /// The file cannot be read or is not text.
    pub fn dns(&self) -> Result<Dns, ConfigError> {
        let Some(path) = &self.resolv_conf else {
            return Ok(Dns::default());
        };
        let mut text = String::new();
        // Nobody may be at the other end of a pipe.
        OpenOptions::new()
            .read(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(path)
            .and_then(|file| file.take(RESOLV_CONF_MAX).read_to_string(&mut text))
            .map_err(|source| ConfigError::ResolvConf {
                path: path.clone(),
                source,
            })?;
        Ok(parse_resolv_conf(&text))
    }

    /// Why the address must not be given out, if so.
    ///
    /// The gateway of any range counts, as another range may share its subnet.
    pub(super) fn reserved(&self, address: IpAddr, range: &Range) -> Option<&'static str> {
        let gateway = |set: &RangeSet| set.ranges().iter().any(|range| range.gateway() == address);
        range
            .reserved(address)
            .or_else(|| self.sets.iter().any(gateway).then_some("the gateway"))
    }
}

/// The directory of `ipam.dataDir`, or its default: all that DEL and GC need, which
/// therefore work whatever else became of the configuration.
///
/// # Errors
/// It is not an absolute path.
pub fn data_dir(ipam: &Value) -> Result<PathBuf, ConfigError> {
    let key = Key::root("ipam");
    let Some(dir) = key.string(key.object(ipam)?, "dataDir")? else {
        return Ok(DEFAULT_DATA_DIR.into());
    };
    if Path::new(dir).is_absolute() && !dir.contains('\0') {
        Ok(dir.into())
    } else {
        Err(key
            .join("dataDir")
            .invalid(&Value::from(dir), "an absolute path"))
    }
}

fn check_sets(sets: &[RangeSet], cni_version: &str) -> Result<(), ConfigError> {
    if sets.is_empty() {
        return Err(ConfigError::NoRanges);
    }
    let v4 = sets.iter().filter(|set| set.is_ipv4()).count();
    if (v4 > 1 || sets.len() - v4 > 1) && matches!(cni_version, "" | "0.1.0" | "0.2.0") {
        let version = if cni_version.is_empty() {
            "0.1.0"
        } else {
            cni_version
        };
        return Err(ConfigError::OnePerFamily(version.into()));
    }
    for (index, set) in sets.iter().enumerate() {
        if let Some(before) = sets[..index].iter().position(|before| before.overlaps(set)) {
            return Err(ConfigError::Overlap(before, index));
        }
    }
    Ok(())
}

/// The outer error is of a value, the inner of the range that the values make:
/// it is reported with the number of its set.
type ParsedRange = Result<Result<Range, RangeError>, ConfigError>;

fn ranges_of(key: &Key, value: &Value) -> Result<Vec<ParsedRange>, ConfigError> {
    let ranges = key.array(value)?.iter().enumerate();
    Ok(ranges
        .map(|(index, value)| range(&key.at(index), value))
        .collect())
}

fn range(key: &Key, value: &Value) -> ParsedRange {
    let object = key.object(value)?;
    let Some(subnet) = get(object, "subnet") else {
        return Ok(Err(RangeError::NoSubnet));
    };
    let subnet = key.join("subnet").network(subnet)?;
    let (start, end, gateway) = (
        key.optional_address(object, "rangeStart")?,
        key.optional_address(object, "rangeEnd")?,
        key.optional_address(object, "gateway")?,
    );
    Ok(Range::new(subnet, start, end, gateway))
}

fn route(key: &Key, value: &Value) -> Result<Route, ConfigError> {
    let object = key.object(value)?;
    let dst_key = key.join("dst");
    let dst_value = get(object, "dst").unwrap_or(&Value::Null);
    let dst = dst_key.network(dst_value)?;
    if dst.addr() != dst.network() {
        return Err(dst_key.invalid(dst_value, "a network without host bits"));
    }
    let gw = key.optional_address(object, "gw")?;
    if let Some(address) = gw.filter(|gw| gw.is_ipv4() != dst.addr().is_ipv4()) {
        let value = Value::from(address.to_string());
        return Err(key
            .join("gw")
            .invalid(&value, "an address of the family of dst"));
    }
    let number = |name: &str| {
        let expected = "a whole number from 0 to 4294967295";
        get(object, name).map_or(Ok(None), |value| {
            let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
            number
                .map(Some)
                .ok_or_else(|| key.join(name).invalid(value, expected))
        })
    };
    // Go omits these when they are 0, so 0 says nothing.
    let positive = |name| Ok(number(name)?.filter(|&number| number != 0));
    let scope = match number("scope")?.map(u8::try_from) {
        None => None,
        Some(Ok(scope)) => Some(scope),
        Some(Err(_)) => {
            let value = get(object, "scope").unwrap_or(&Value::Null);
            return Err(key
                .join("scope")
                .invalid(value, "a whole number from 0 to 255"));
        }
    };
    Ok(Route {
        mtu: positive("mtu")?,
        advmss: positive("advmss")?,
        priority: positive("priority")?,
        table: number("table")?,
        scope,
        ..Route::new(dst, gw)
    })
}

fn parse_resolv_conf(text: &str) -> Dns {
    let mut dns = Dns::default();
    for line in text.lines().map(str::trim) {
        if line.starts_with(['#', ';']) {
            continue;
        }
        let mut words = line.split_whitespace();
        let (Some(keyword), Some(first)) = (words.next(), words.next()) else {
            continue;
        };
        let all = || std::iter::once(first).chain(words).map(str::to_owned);
        match keyword {
            "nameserver" => dns.nameservers.push(first.into()),
            "domain" => dns.domain = Some(first.into()),
            "search" => dns.search.extend(all()),
            "options" => dns.options.extend(all()),
            _ => {}
        }
    }
    dns
}

fn field<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    get(value.as_object()?, name)
}

/// The value of a key in any case, the exact one first; null is the same as absent.
fn get<'a>(object: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    let folded = || {
        object
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
    };
    object
        .get(name)
        .or_else(|| folded().map(|(_, value)| value))
        .filter(|value| !value.is_null())
}

/// Where a value stands, for messages.
#[derive(Clone)]
struct Key(String);

impl Key {
    fn root(name: &str) -> Self {
        Self(name.into())
    }

    fn join(&self, name: &str) -> Self {
        Self(format!("{}.{name}", self.0))
    }

    fn at(&self, index: usize) -> Self {
        Self(format!("{}[{index}]", self.0))
    }

    fn invalid(&self, value: &Value, expected: &'static str) -> ConfigError {
        ConfigError::Invalid {
            key: self.0.clone(),
            value: value.to_string(),
            expected,
        }
    }

    fn object<'a>(&self, value: &'a Value) -> Result<&'a Map<String, Value>, ConfigError> {
        value
            .as_object()
            .ok_or_else(|| self.invalid(value, "an object"))
    }

    fn array<'a>(&self, value: &'a Value) -> Result<&'a [Value], ConfigError> {
        self.optional_array(Some(value))
    }

    fn optional_array<'a>(&self, value: Option<&'a Value>) -> Result<&'a [Value], ConfigError> {
        match value {
            None | Some(Value::Null) => Ok(&[]),
            Some(Value::Array(list)) => Ok(list),
            Some(other) => Err(self.invalid(other, "a list")),
        }
    }

    /// The string of a key; an empty one is the same as none.
    fn string<'a>(
        &self,
        object: &'a Map<String, Value>,
        name: &str,
    ) -> Result<Option<&'a str>, ConfigError> {
        let Some(value) = get(object, name) else {
            return Ok(None);
        };
        let text = value
            .as_str()
            .ok_or_else(|| self.join(name).invalid(value, "a string"))?;
        Ok(Some(text).filter(|text| !text.is_empty()))
    }

    /// An address, with or without a prefix length behind it (which says nothing).
    fn address(&self, value: &Value) -> Result<IpAddr, ConfigError> {
        let text = value.as_str().unwrap_or_default();
        let address = text.parse::<IpAddr>().ok();
        address
            .or_else(|| text.parse::<IpNet>().ok().map(|net| net.addr()))
            .map(|address| address.to_canonical())
            .ok_or_else(|| self.invalid(value, "an IP address such as \"10.1.0.7\""))
    }

    /// The address of a key; an empty string is the same as none.
    fn optional_address(
        &self,
        object: &Map<String, Value>,
        name: &str,
    ) -> Result<Option<IpAddr>, ConfigError> {
        let Some(text) = self.string(object, name)? else {
            return Ok(None);
        };
        let address = text.parse::<IpAddr>().map_err(|_| {
            let expected = "an IP address such as \"10.1.0.1\"";
            self.join(name).invalid(&Value::from(text), expected)
        })?;
        Ok(Some(address.to_canonical()))
    }

    fn network(&self, value: &Value) -> Result<IpNet, ConfigError> {
        let net = value.as_str().and_then(|text| text.parse::<IpNet>().ok());
        net.filter(|net| net.addr() == net.addr().to_canonical())
            .ok_or_else(|| {
                self.invalid(
                    value,
                    "a network such as \"10.1.0.0/16\" or \"fd00:1::/64\"",
                )
            })
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
