//! The network configuration that arrives on stdin (spec section 1, and the
//! options of the stock `bridge` plugin).

use std::{net::IpAddr, str::FromStr};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::mac::MacAddr;

use super::{
    env::{CniArgs, Command, parse_requested_ip},
    error::CniError,
    json::{self, Object, shown},
    names::{self, AttachmentId},
    result::{CniResult, Dns},
    version::SpecVersion,
};

/// The gateway device of a configuration that names none, as with stock `bridge`.
pub const DEFAULT_BRIDGE: &str = "cni0";

/// The MTUs, in bytes, that a veth can have: ETH_MIN_MTU (68, the smallest that
/// IPv4 works with, RFC 791) to ETH_MAX_MTU (include/uapi/linux/if_ether.h).
const MTU_RANGE: std::ops::RangeInclusive<i64> = 68..=65535;

/// The highest VLAN id that a frame can be tagged with (IEEE 802.1Q).
const VLAN_MAX: i64 = 4094;

/// How much the eBPF programs of a network's ports write to their log. Each level
/// is a set of programs of its own: what a level leaves out is not in them at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Nothing.
    #[default]
    Off,
    /// Errors.
    Error,
    /// And warnings.
    Warn,
    /// And what happens rarely.
    Info,
    /// And each drop.
    Debug,
    /// And each frame.
    Trace,
}

impl LogLevel {
    /// Its name in a configuration and in a pin path.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }

    /// Its number in `aya_log::Level`, 0 for none.
    pub const fn number(self) -> u8 {
        self as u8
    }
}

impl FromStr for LogLevel {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Ok(match text {
            "off" => Self::Off,
            "error" => Self::Error,
            "warn" => Self::Warn,
            "info" => Self::Info,
            "debug" => Self::Debug,
            "trace" => Self::Trace,
            _ => return Err(()),
        })
    }
}

/// What masquerades, where that is asked for: `ipMasqBackend`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MasqBackend {
    /// `iptables`
    Iptables,
    /// `nftables`
    Nftables,
}

impl FromStr for MasqBackend {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "iptables" => Ok(Self::Iptables),
            "nftables" => Ok(Self::Nftables),
            _ => Err(()),
        }
    }
}

/// A validated network configuration.
#[derive(Clone, Debug)]
pub struct NetworkConfig {
    /// `cniVersion`: the version that results and errors are written in.
    pub cni_version: SpecVersion,
    /// `name` of the network, checked by [`names::check_network_name`].
    pub name: String,
    /// `type`: the name that the plugin is called by.
    pub plugin_type: String,
    /// `bridge` (default [`DEFAULT_BRIDGE`]): the gateway device, which also
    /// identifies the segment.
    pub bridge: String,
    /// `isGateway`, or implied by `isDefaultGateway`: the host has the gateway
    /// address of each subnet, and forwards.
    pub is_gateway: bool,
    /// `isDefaultGateway`: the gateway is the container's default route.
    pub is_default_gateway: bool,
    /// `forceAddress`: replace another address of the gateway device, where
    /// otherwise it is an error.
    pub force_address: bool,
    /// `ipMasq`: masquerade what leaves the network.
    pub ip_masq: bool,
    /// `ipMasqBackend`
    pub ip_masq_backend: Option<MasqBackend>,
    /// `mtu` in bytes, 68 to 65535; `None` (0 in the configuration) is the
    /// kernel's default. IPv6 needs 1280 (RFC 8200 section 5), which only
    /// matters once an address is known.
    pub mtu: Option<u32>,
    /// `hairpinMode`: a frame may go back to the port that it came from.
    pub hairpin_mode: bool,
    /// `promiscMode`: the gateway device takes frames that are not for it.
    pub promisc_mode: bool,
    /// `enabledad`: duplicate address detection in the container.
    pub enable_dad: bool,
    /// `disableContainerInterface`: leave the container's interface down.
    pub disable_container_interface: bool,
    /// `macspoofchk`: drop frames of other source addresses than the port's.
    pub mac_spoof_check: bool,
    /// `portIsolation`: isolated ports do not reach each other.
    pub port_isolation: bool,
    /// The wanted address of the container's interface, unicast:
    /// `runtimeConfig.mac`, else `args.cni.mac`, else `MAC` of CNI_ARGS.
    pub mac: Option<MacAddr>,
    /// The wanted IP addresses of all sources, none twice: `IP` of CNI_ARGS,
    /// `args.cni.ips`, `runtimeConfig.ips`, in this order. The `ipam` plugin must
    /// assign them all.
    pub requested_ips: Vec<IpAddr>,
    /// `dns`; if not empty it replaces that of the `ipam` plugin.
    pub dns: Dns,
    /// `ipam` as it came; `null` if absent.
    pub ipam: Value,
    /// `ipam.type`: the `ipam` plugin. `None` is a network without addresses.
    pub ipam_type: Option<String>,
    /// `runtimeConfig.ipRanges` (capability `ipRanges`) as it came; `null` if
    /// absent.
    pub ip_ranges: Value,
    /// `runtimeConfig.portMappings` (capability `portMappings`) as it came.
    pub port_mappings: Vec<Value>,
    /// `args.cni.labels`, pairs of key and value, in order.
    pub labels: Vec<(String, String)>,
    /// `prevResult`: what the plugins before this one in the chain made (ADD), or
    /// what ADD answered (CHECK, DEL).
    pub prev_result: Option<CniResult>,
    /// `cni.dev/valid-attachments`, or its older name `cni.dev/attachments`: what
    /// GC must leave alone. Always there for GC.
    pub valid_attachments: Option<Vec<AttachmentId>>,
    /// `logLevel`, our own: `off` (default), `error`, `warn`, `info`, `debug`,
    /// `trace`.
    pub log_level: LogLevel,
    /// The whole configuration. Of keys that differ in case only, it has the last.
    pub raw: Value,
    /// The whole configuration as it came, for delegated plugins.
    pub stdin: Vec<u8>,
    /// What the operator should know and is no error.
    pub warnings: Vec<String>,
}

/// `cniVersion` of a configuration, for errors that occur before the rest of it
/// is known to be good.
///
/// # Errors
///
/// Code 6 if `stdin` is no JSON object, 7 if `cniVersion` is no string, 1 if it
/// is no supported version.
pub fn peek_version(raw: &Value) -> Result<SpecVersion, CniError> {
    root(raw)?.str("cniVersion")?.unwrap_or_default().parse()
}

fn root(raw: &Value) -> Result<Object<'_>, CniError> {
    if raw.is_object() {
        Object::new(raw, "")
    } else {
        Err(CniError::decode(
            "the network configuration",
            format!("{} where an object is expected", shown(raw)),
        ))
    }
}

/// Decides what becomes of an invalid value.
///
/// DEL and GC must get rid of an attachment whatever became of its
/// configuration; for them a value that does not identify anything is replaced
/// by its default, with a warning.
struct Judge {
    lenient: bool,
    warnings: Vec<String>,
}

impl Judge {
    fn judge<T: Default>(&mut self, read: Result<T, CniError>) -> Result<T, CniError> {
        match read {
            Err(error) if self.lenient => {
                self.warnings.push(format!("ignored: {error}"));
                Ok(T::default())
            }
            read => read,
        }
    }
}

impl NetworkConfig {
    /// Parses and validates what arrived on stdin for `command`, with the
    /// `CNI_ARGS` that came along.
    ///
    /// For DEL and GC an invalid value is a warning, unless the attachment or its
    /// lease could not be found without it (`cniVersion`, `name`, `ipam`,
    /// `cni.dev/valid-attachments`).
    ///
    /// # Errors
    ///
    /// Code 6 for what is no JSON object, 1 for an unsupported `cniVersion`, 2 for
    /// an option that is not built, 7 for any other invalid value.
    pub fn parse(stdin: Vec<u8>, command: Command, args: &CniArgs) -> Result<Self, CniError> {
        let raw =
            json::decode(&stdin).map_err(|e| CniError::decode("the network configuration", e))?;
        Self::from_value(raw, stdin, command, args)
    }

    /// As [`Self::parse`], of JSON that is decoded already.
    ///
    /// # Errors
    ///
    /// Those of [`Self::parse`].
    pub fn from_value(
        raw: Value,
        stdin: Vec<u8>,
        command: Command,
        args: &CniArgs,
    ) -> Result<Self, CniError> {
        let cni_version = peek_version(&raw)?;
        let root = root(&raw)?;
        let mut judge = Judge {
            lenient: matches!(command, Command::Del | Command::Gc),
            warnings: Vec::new(),
        };

        let name = root
            .non_empty("name")?
            .ok_or_else(|| CniError::missing_config("name", "the name of the network"))?;
        names::check_network_name(name)
            .map_err(|e| CniError::invalid_config("name", format!("{name:?}"), e))?;
        let plugin_type = judge.judge(root.str("type"))?.unwrap_or_default();
        let bridge = judge.judge(bridge(&root))?;
        let bridge = bridge.unwrap_or(DEFAULT_BRIDGE).to_owned();

        let mut flag = |key| judge.judge(root.bool(key)).map(Option::unwrap_or_default);
        let is_default_gateway = flag("isDefaultGateway")?;
        let is_gateway = flag("isGateway")? || is_default_gateway;
        let force_address = flag("forceAddress")?;
        let ip_masq = flag("ipMasq")?;
        let hairpin_mode = flag("hairpinMode")?;
        let promisc_mode = flag("promiscMode")?;
        let enable_dad = flag("enabledad")?;
        let disable_container_interface = flag("disableContainerInterface")?;
        let mac_spoof_check = flag("macspoofchk")?;
        let port_isolation = flag("portIsolation")?;
        // Which VLANs a port leaves matters with VLAN filtering only.
        flag("preserveDefaultVlan")?;

        let ip_masq_backend =
            judge.judge(root.parsed("ipMasqBackend", "\"iptables\" or \"nftables\""))?;
        let mtu = judge.judge(mtu(&root))?;
        judge.judge(check_vlans(&root))?;
        if hairpin_mode && promisc_mode {
            judge.judge(Err::<(), _>(CniError::invalid_config(
                "promiscMode",
                "true together with hairpinMode",
                "false, or hairpinMode false",
            )))?;
        }

        let ipam = root.object("ipam")?;
        let ipam_type = ipam.non_empty("type")?.map(str::to_owned);
        let ipam_raw = root.get("ipam").cloned().unwrap_or_default();
        if ipam_type.is_none() && !ipam.unknown(&["type"]).is_empty() {
            judge.judge(Err::<(), _>(CniError::missing_config(
                "ipam.type",
                "the name of an IPAM plugin such as \"host-local\"",
            )))?;
        }
        if disable_container_interface && ipam_type.is_some() {
            judge.judge(Err::<(), _>(CniError::invalid_config(
                "disableContainerInterface",
                "true together with ipam",
                "false, or ipam absent: an interface that is down has no use for addresses",
            )))?;
        }

        let runtime = judge.judge(object(&root, "runtimeConfig"))?;
        let cni_args = judge.judge(object(&root, "args").and_then(|args| match args {
            Some(args) => object(&args, "cni"),
            None => Ok(None),
        }))?;
        let mut mac = args.mac;
        let mut requested_ips = args.ips.clone();
        for source in [&cni_args, &runtime].into_iter().flatten() {
            mac = judge.judge(unicast_mac(source))?.or(mac);
            requested_ips.extend(judge.judge(ips(source))?);
        }
        let mut seen = std::collections::HashSet::new();
        requested_ips.retain(|ip| seen.insert(*ip));

        let labels = match &cni_args {
            Some(cni_args) => judge.judge(labels(cni_args))?,
            None => Vec::new(),
        };
        let mut ip_ranges = Value::Null;
        let mut port_mappings = Vec::new();
        if let Some(runtime) = &runtime {
            judge.judge(runtime.array("ipRanges"))?;
            ip_ranges = runtime.get("ipRanges").cloned().unwrap_or_default();
            port_mappings = judge.judge(runtime.array("portMappings"))?.to_vec();
        }

        let dns = judge.judge(object(&root, "dns").and_then(|dns| match dns {
            Some(dns) => Dns::from_object(&dns),
            None => Ok(Dns::default()),
        }))?;
        let prev_result = judge.judge(
            root.get("prevResult")
                .map(|value| CniResult::from_json(value, "prevResult", cni_version))
                .transpose(),
        )?;
        if command == Command::Check && prev_result.is_none() {
            return Err(CniError::missing_config(
                "prevResult",
                "the result of ADD, which CHECK compares with",
            ));
        }
        let valid_attachments = match command {
            Command::Gc => Some(valid_attachments(&root)?),
            _ => None,
        };
        let log_level = judge
            .judge(root.parsed(
                "logLevel",
                "one of \"off\", \"error\", \"warn\", \"info\", \"debug\", \"trace\"",
            ))?
            .unwrap_or_default();

        let mut warnings = judge.warnings;
        if command == Command::Add {
            if ip_masq {
                warnings.push(
                    "ipMasq is not built yet: traffic leaves with the pod's own address".to_owned(),
                );
            }
            if !port_mappings.is_empty() {
                warnings.push(
                    "portMappings are not built yet: published ports are left to the portmap \
                     plugin"
                        .to_owned(),
                );
            }
        }
        Ok(Self {
            cni_version,
            name: name.to_owned(),
            plugin_type: plugin_type.to_owned(),
            bridge,
            is_gateway,
            is_default_gateway,
            force_address,
            ip_masq,
            ip_masq_backend,
            mtu,
            hairpin_mode,
            promisc_mode,
            enable_dad,
            disable_container_interface,
            mac_spoof_check,
            port_isolation,
            mac,
            requested_ips,
            dns,
            ipam: ipam_raw,
            ipam_type,
            ip_ranges,
            port_mappings,
            labels,
            prev_result,
            valid_attachments,
            log_level,
            stdin,
            warnings,
            raw,
        })
    }
}

/// An object that may be absent.
fn object<'a>(parent: &Object<'a>, key: &str) -> Result<Option<Object<'a>>, CniError> {
    parent.object(key).map(Some)
}

fn bridge<'a>(root: &Object<'a>) -> Result<Option<&'a str>, CniError> {
    let name = root.str("bridge")?;
    if let Some(name) = name {
        names::check_ifname(name)
            .map_err(|e| CniError::invalid_config("bridge", format!("{name:?}"), e))?;
    }
    Ok(name)
}

fn mtu(root: &Object<'_>) -> Result<Option<u32>, CniError> {
    if root.get("mtu").and_then(Value::as_i64) == Some(0) {
        return Ok(None);
    }
    let mtu = root.int("mtu", MTU_RANGE);
    mtu.map_err(|e| e.context("0 is the kernel's default"))
}

/// Refuses VLANs, which are known and not built.
fn check_vlans(root: &Object<'_>) -> Result<(), CniError> {
    let vlan = root.int::<u16>("vlan", 0..=VLAN_MAX)?.unwrap_or_default();
    if vlan != 0 {
        return Err(CniError::unsupported(
            "vlan",
            vlan,
            "0, the untagged network",
        ));
    }
    if let Some(trunk) = root.get("vlanTrunk")
        && !root.array("vlanTrunk")?.is_empty()
    {
        return Err(CniError::unsupported(
            "vlanTrunk",
            shown(trunk),
            "an empty list; tagged frames pass as they are",
        ));
    }
    Ok(())
}

fn unicast_mac(source: &Object<'_>) -> Result<Option<MacAddr>, CniError> {
    const EXPECTED: &str = "a unicast ethernet address such as \"02:00:5e:10:00:01\"";
    let mac: Option<MacAddr> = source.parsed("mac", EXPECTED)?;
    match (mac, source.get("mac")) {
        (Some(mac), Some(value)) if !mac.is_unicast() => {
            Err(source.invalid("mac", value, EXPECTED))
        }
        _ => Ok(mac),
    }
}

fn ips(source: &Object<'_>) -> Result<Vec<IpAddr>, CniError> {
    let ips: Vec<RequestedIp> = source.list(
        "ips",
        "an IP address such as \"10.1.2.3\", or with a prefix length",
    )?;
    Ok(ips.into_iter().map(|RequestedIp(ip)| ip).collect())
}

struct RequestedIp(IpAddr);

impl FromStr for RequestedIp {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        parse_requested_ip(text).map(Self).ok_or(())
    }
}

fn labels(cni_args: &Object<'_>) -> Result<Vec<(String, String)>, CniError> {
    let labels = cni_args.objects("labels")?;
    labels
        .iter()
        .map(|label| {
            let text = |key| Ok::<_, CniError>(label.str(key)?.unwrap_or_default().to_owned());
            Ok((text("key")?, text("value")?))
        })
        .collect()
}

fn valid_attachments(root: &Object<'_>) -> Result<Vec<AttachmentId>, CniError> {
    const KEYS: [&str; 2] = ["cni.dev/valid-attachments", "cni.dev/attachments"];
    let Some(key) = KEYS.into_iter().find(|key| root.has(key)) else {
        // To take it for an empty list would remove every attachment.
        return Err(CniError::missing_config(
            KEYS[0],
            "the list of attachments to keep",
        ));
    };
    let attachments = root.objects(key)?;
    attachments
        .iter()
        .map(|attachment| {
            let text = |key| {
                attachment
                    .non_empty(key)?
                    .map(str::to_owned)
                    .ok_or_else(|| {
                        CniError::missing_config(
                            &attachment.path(key),
                            "a string that is not empty",
                        )
                    })
            };
            Ok(AttachmentId {
                container_id: text("containerID")?,
                ifname: text("ifname")?,
            })
        })
        .collect()
}
