//! The network configuration that arrives on stdin (spec section 1, and the
//! options of the stock `bridge` plugin).

use std::{net::IpAddr, str::FromStr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::mac::MacAddr;

use super::{
    env::{CniArgs, Command, parse_requested_ip},
    error::CniError,
    json::{self, Object, shown},
    names::{self, AttachmentId},
    ports::{self, PortMapping},
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
    Off = 0,
    /// Each drop.
    Debug = 4,
    /// And each frame.
    Trace = 5,
}

impl LogLevel {
    /// Every level.
    pub const ALL: [Self; 3] = [Self::Off, Self::Debug, Self::Trace];

    /// Its name in a configuration and in a pin path.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
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
        Self::ALL
            .into_iter()
            .find(|level| level.name() == text)
            .ok_or(())
    }
}

/// What masquerades, where that is asked for: `ipMasqBackend`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MasqBackend {
    /// `ebpf`: the programs on uplinks.
    #[default]
    Ebpf,
    /// `nftables`, or `iptables`, which a node without iptables has too: a rule of the
    /// network's in netfilter.
    Nftables,
}

impl FromStr for MasqBackend {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "ebpf" => Ok(Self::Ebpf),
            "nftables" | "iptables" => Ok(Self::Nftables),
            _ => Err(()),
        }
    }
}

/// What passes the host's stack, and so netfilter: `netfilter`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Netfilter {
    /// `routed`: what the host routes. What pods of a network send each other does not,
    /// nor what is sent to published ports.
    #[default]
    Routed,
    /// `all`: what pods send each other too.
    All,
    /// `none`: what the programs masquerade does not either.
    None,
}

impl Netfilter {
    const fn name(self) -> &'static str {
        match self {
            Self::Routed => "routed",
            Self::All => "all",
            Self::None => "none",
        }
    }
}

impl FromStr for Netfilter {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        [Self::Routed, Self::All, Self::None]
            .into_iter()
            .find(|scope| scope.name() == text)
            .ok_or(())
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
    /// `ipMasq`, and by what (`ipMasqBackend`): masquerade what leaves the network.
    pub ip_masq: Option<MasqBackend>,
    /// `ipMasqExempt`, our own: destinations for which that is not done, besides the
    /// network's own subnets and multicast; sorted, none twice.
    pub ip_masq_exempt: Vec<IpNet>,
    /// `netfilter`, our own: what passes the host's stack.
    pub netfilter: Netfilter,
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
    /// `runtimeConfig.portMappings` (capability `portMappings`): the published
    /// ports, no two of which overlap.
    pub port_mappings: Vec<PortMapping>,
    /// `uplinks`, our own: the devices on which published ports are served;
    /// `None` leaves it to the plugin to find them.
    pub uplinks: Option<Vec<String>>,
    /// `xdpUplinks`, our own: the devices on which XDP serves them too.
    pub xdp_uplinks: Vec<String>,
    /// `args.cni.labels`, pairs of key and value, in order.
    pub labels: Vec<(String, String)>,
    /// `prevResult`: what the plugins before this one in the chain made (ADD), or
    /// what ADD answered (CHECK, DEL).
    pub prev_result: Option<CniResult>,
    /// `cni.dev/valid-attachments`, or its older name `cni.dev/attachments`: what
    /// GC must leave alone. Always there for GC.
    pub valid_attachments: Option<Vec<AttachmentId>>,
    /// `logLevel`, our own: `off` (default), `debug` or `trace`.
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
    command: Command,
    warnings: Vec<String>,
}

impl Judge {
    fn judge<T: Default>(&mut self, read: Result<T, CniError>) -> Result<T, CniError> {
        let lenient = matches!(self.command, Command::Del | Command::Gc);
        self.judge_as(lenient, read)
    }

    /// As [`Self::judge`], of what is published: it cannot have become so by an
    /// invalid value, so CHECK has nothing to refuse either.
    fn judge_ports<T: Default>(&mut self, read: Result<T, CniError>) -> Result<T, CniError> {
        let lenient = matches!(self.command, Command::Del | Command::Gc | Command::Check);
        self.judge_as(lenient, read)
    }

    fn judge_as<T: Default>(
        &mut self,
        lenient: bool,
        read: Result<T, CniError>,
    ) -> Result<T, CniError> {
        match read {
            Err(error) if lenient => {
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
    /// `cni.dev/valid-attachments`). For CHECK it is one if it is about published
    /// ports.
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
            command,
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

        let backend =
            judge.judge(root.parsed("ipMasqBackend", "\"ebpf\", \"nftables\" or \"iptables\""))?;
        let ip_masq = ip_masq.then(|| backend.unwrap_or_default());
        let ip_masq_exempt = judge.judge(exempt(&root, ip_masq))?;
        let netfilter = judge
            .judge(netfilter(&root, is_gateway, ip_masq))?
            .unwrap_or_default();
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
        let mut warnings = Vec::new();
        let mut ip_ranges = Value::Null;
        let mut port_mappings = Vec::new();
        if let Some(runtime) = &runtime {
            judge.judge(runtime.array("ipRanges"))?;
            ip_ranges = runtime.get("ipRanges").cloned().unwrap_or_default();
            port_mappings = judge.judge_ports(ports::mappings(runtime))?;
            if runtime.get("bandwidth").is_some() {
                warnings.push(
                    "runtimeConfig.bandwidth has no effect here: shaping is left to the bandwidth \
                     plugin",
                );
            }
        }

        // Runtimes leave the capability in place: so what will not do is refused
        // before there is a pod with ports.
        let publishes = [
            (
                "capabilities.portMappings",
                judge.judge_ports(declares_ports(&root))?,
            ),
            ("runtimeConfig.portMappings", !port_mappings.is_empty()),
        ];
        if netfilter == Netfilter::All
            && let Some((key, _)) = publishes.iter().find(|(_, there)| *there)
        {
            judge.judge_ports(Err::<(), _>(CniError::invalid_config(
                "netfilter",
                format!("\"all\" together with {key}"),
                "\"routed\", or the capability portMappings that of a \"portmap\" entry after this \
                 one: what is sent to the ports that this plugin publishes does not pass netfilter",
            )))?;
        }

        judge.judge_ports(ports::check_options(&root))?;
        let uplinks = judge.judge_ports(ports::devices(&root, "uplinks"))?;
        let xdp_uplinks = judge.judge_ports(ports::devices(&root, "xdpUplinks"))?;

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
        if command == Command::Add && ipam_type.is_none() {
            // No more addresses than these will there be. That a version cannot
            // tell of none is better known before anything is made.
            let addresses = prev_result.clone().unwrap_or_default();
            addresses.to_json(cni_version)?;
        }
        let valid_attachments = match command {
            Command::Gc => Some(valid_attachments(&root)?),
            _ => None,
        };
        let log_level = judge
            .judge(root.parsed(
                "logLevel",
                "\"off\", \"debug\" (each drop) or \"trace\" (each frame too)",
            ))?
            .unwrap_or_default();

        // Once is enough: the other verbs, some of them polled, are silent.
        if command == Command::Add {
            judge
                .warnings
                .extend(warnings.into_iter().map(str::to_owned));
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
            ip_masq_exempt,
            netfilter,
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
            uplinks,
            xdp_uplinks: xdp_uplinks.unwrap_or_default(),
            labels,
            prev_result,
            valid_attachments,
            log_level,
            stdin,
            warnings: judge.warnings,
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

/// Whether the capability `portMappings` is this plugin's.
fn declares_ports(root: &Object<'_>) -> Result<bool, CniError> {
    let declared = root.object("capabilities")?.bool("portMappings")?;
    Ok(declared.unwrap_or_default())
}

/// The destinations that `ipMasqExempt` lists.
fn exempt(root: &Object<'_>, ip_masq: Option<MasqBackend>) -> Result<Vec<IpNet>, CniError> {
    let prefixes: Vec<Prefix> = root.list(
        "ipMasqExempt",
        "an IP prefix without bits beyond its length, such as \"10.0.0.0/8\", or an IP address",
    )?;
    let mut prefixes: Vec<IpNet> = prefixes.into_iter().map(|Prefix(net)| net).collect();
    prefixes.sort_unstable();
    prefixes.dedup();
    if ip_masq.is_none()
        && let Some(first) = prefixes.first()
    {
        return Err(CniError::invalid_config(
            "ipMasqExempt",
            format!("a list with {first} without ipMasq"),
            "absent, or ipMasq true: nothing is masqueraded without it",
        ));
    }
    Ok(prefixes)
}

struct Prefix(IpNet);

impl FromStr for Prefix {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        text.parse::<IpNet>()
            .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
            .ok()
            .filter(|net| *net == net.trunc())
            .map(Self)
            .ok_or(())
    }
}

/// `netfilter`, if it means something for this network.
fn netfilter(
    root: &Object<'_>,
    is_gateway: bool,
    ip_masq: Option<MasqBackend>,
) -> Result<Option<Netfilter>, CniError> {
    let scope: Option<Netfilter> = root.parsed("netfilter", "\"routed\", \"all\" or \"none\"")?;
    let refuse = |without: &str, expected: &str| {
        let value = format!("{:?} without {without}", scope.unwrap_or_default().name());
        Err(CniError::invalid_config("netfilter", value, expected))
    };
    match scope {
        Some(Netfilter::All) if !is_gateway => refuse(
            "isGateway",
            "\"routed\", or isGateway true: it is the gateway that passes packets on",
        ),
        Some(Netfilter::None) if ip_masq != Some(MasqBackend::Ebpf) => refuse(
            "ipMasq by eBPF",
            "\"routed\", or ipMasq true with ipMasqBackend \"ebpf\": only what the programs \
             masquerade can do without netfilter",
        ),
        scope => Ok(scope),
    }
}

fn mtu(root: &Object<'_>) -> Result<Option<u32>, CniError> {
    if root.get("mtu").and_then(Value::as_i64) == Some(0) {
        return Ok(None);
    }
    root.read(
        "mtu",
        "0 (the kernel's default) or a whole number from 68 to 65535",
        |value| {
            let mtu = value.as_i64().filter(|mtu| MTU_RANGE.contains(mtu))?;
            u32::try_from(mtu).ok()
        },
    )
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::cni::error::ErrorCode;

    fn parse_as(command: Command, args: &str, more: &Value) -> Result<NetworkConfig, CniError> {
        let mut config = json!({ "cniVersion": "1.1.0", "name": "net", "type": "bpf-bridge" });
        for (key, value) in more.as_object().unwrap() {
            config[key] = value.clone();
        }
        let args = CniArgs::parse(args).unwrap();
        NetworkConfig::parse(config.to_string().into_bytes(), command, &args)
    }

    fn parse(more: &Value) -> Result<NetworkConfig, CniError> {
        parse_as(Command::Add, "", more)
    }

    #[test]
    fn defaults_are_those_of_stock_bridge() {
        let config = parse(&json!({})).unwrap();
        assert_eq!(config.cni_version, SpecVersion::V1_1_0);
        assert_eq!(
            (config.name.as_str(), config.plugin_type.as_str()),
            ("net", "bpf-bridge")
        );
        assert_eq!(config.bridge, "cni0");
        for flag in [
            config.is_gateway,
            config.is_default_gateway,
            config.force_address,
            config.hairpin_mode,
            config.promisc_mode,
            config.enable_dad,
            config.disable_container_interface,
            config.mac_spoof_check,
            config.port_isolation,
        ] {
            assert!(!flag);
        }
        assert_eq!(config.ip_masq, None);
        assert!(config.ip_masq_exempt.is_empty());
        assert_eq!(config.netfilter, Netfilter::Routed);
        assert_eq!(config.mtu, None);
        assert_eq!(config.mac, None);
        assert_eq!(config.ipam_type, None);
        assert_eq!(config.log_level, LogLevel::Off);
        assert!(config.dns.is_empty());
        assert!(config.prev_result.is_none());
        assert!(config.port_mappings.is_empty());
        assert!(config.uplinks.is_none() && config.xdp_uplinks.is_empty());
        assert!(config.warnings.is_empty());
    }

    #[test]
    fn every_option_is_read_in_any_case() {
        let config = parse(&json!({
            "BRIDGE": "br1", "isgateway": true, "ForceAddress": true, "ipMasq": true,
            "ipMasqBackend": "nftables", "ipMasqexempt": ["fd00::/8", "10.0.0.0/8", "10.0.0.0/8", "::1"],
            "NetFilter": "routed", "MTU": 9000, "hairpinMode": true, "EnableDad": true,
            "macSpoofChk": true, "portIsolation": true, "preserveDefaultVlan": true, "vlan": 0,
            "vlanTrunk": [], "logLevel": "debug",
            "uplinks": ["eth0"], "xdpuplinks": ["eth1"],
            "dns": { "Nameservers": ["1.1.1.1"], "search": ["a"], "domain": "d", "options": ["o"] },
            "ipam": { "TYPE": "host-local", "subnet": "10.0.0.0/24" },
            "capabilities": { "mac": true }, "cni.dev/x": 1, "unheard-of": [],
            "RuntimeConfig": {
                "mac": "02:00:00:00:00:01", "ips": ["10.0.0.9/24"], "IPRanges": [[{ "subnet": "10.0.0.0/24" }]],
                "portMappings": [{ "HostPort": 8080, "ContainerPort": 80 }], "bandwidth": {},
            },
            "args": { "CNI": { "labels": [{ "key": "app", "value": "x" }] } },
        }))
        .unwrap();
        assert_eq!(config.bridge, "br1");
        assert!(config.is_gateway && !config.is_default_gateway && config.force_address);
        assert!(config.hairpin_mode && config.enable_dad);
        assert!(config.mac_spoof_check && config.port_isolation);
        assert_eq!(config.ip_masq, Some(MasqBackend::Nftables));
        let exempt: Vec<_> = config.ip_masq_exempt.iter().map(IpNet::to_string).collect();
        assert_eq!(exempt, ["10.0.0.0/8", "::1/128", "fd00::/8"]);
        assert_eq!(config.mtu, Some(9000));
        assert_eq!(config.log_level, LogLevel::Debug);
        assert_eq!(config.dns.nameservers, ["1.1.1.1"]);
        assert_eq!(config.ipam_type.as_deref(), Some("host-local"));
        assert_eq!(config.ipam["subnet"], "10.0.0.0/24");
        assert_eq!(config.mac, Some(MacAddr::new([2, 0, 0, 0, 0, 1])));
        assert_eq!(
            config.requested_ips,
            ["10.0.0.9".parse::<IpAddr>().unwrap()]
        );
        assert_eq!(config.ip_ranges, json!([[{ "subnet": "10.0.0.0/24" }]]));
        assert_eq!(config.port_mappings.len(), 1);
        assert_eq!(config.uplinks, Some(vec!["eth0".to_owned()]));
        assert_eq!(config.xdp_uplinks, ["eth1"]);
        assert_eq!(config.labels, [("app".to_owned(), "x".to_owned())]);
        assert_eq!(config.raw["unheard-of"], json!([]));
        assert_eq!(config.warnings.len(), 1, "{:?}", config.warnings);
    }

    #[test]
    fn masquerade_is_ebpfs_unless_netfilter_is_asked_to() {
        for (more, expected) in [
            (json!({ "ipMasq": true }), Some(MasqBackend::Ebpf)),
            (
                json!({ "ipMasq": true, "ipMasqBackend": "ebpf" }),
                Some(MasqBackend::Ebpf),
            ),
            (
                json!({ "ipMasq": true, "ipMasqBackend": "iptables" }),
                Some(MasqBackend::Nftables),
            ),
            (json!({ "ipMasqBackend": "nftables" }), None),
        ] {
            assert_eq!(parse(&more).unwrap().ip_masq, expected, "{more}");
        }
    }

    #[test]
    fn netfilter_is_what_was_asked_for() {
        for (more, expected) in [
            (
                json!({ "netfilter": "all", "isDefaultGateway": true }),
                Netfilter::All,
            ),
            (
                json!({ "netfilter": "none", "ipMasq": true }),
                Netfilter::None,
            ),
            (json!({ "netfilter": null }), Netfilter::Routed),
            (
                json!({
                    "netfilter": "all", "isGateway": true,
                    "capabilities": { "mac": true, "portMappings": false },
                }),
                Netfilter::All,
            ),
        ] {
            assert_eq!(parse(&more).unwrap().netfilter, expected, "{more}");
        }
    }

    #[test]
    fn the_default_gateway_is_a_gateway() {
        let config = parse(&json!({ "isDefaultGateway": true, "isGateway": false })).unwrap();
        assert!(config.is_gateway && config.is_default_gateway);
    }

    #[test]
    fn the_runtimes_mac_wins_then_args_then_environment() {
        let mac = |last| Some(MacAddr::new([2, 0, 0, 0, 0, last]));
        let env = "MAC=02:00:00:00:00:01";
        let args = json!({ "cni": { "mac": "02:00:00:00:00:02" } });
        let runtime = json!({ "mac": "02:00:00:00:00:03" });
        for (args_env, more, expected) in [
            (env, json!({}), mac(1)),
            (env, json!({ "args": args }), mac(2)),
            (
                env,
                json!({ "args": args, "runtimeConfig": { "mac": "" } }),
                mac(2),
            ),
            (
                env,
                json!({ "args": args, "runtimeConfig": runtime }),
                mac(3),
            ),
            ("", json!({ "runtimeConfig": runtime }), mac(3)),
        ] {
            let config = parse_as(Command::Add, args_env, &more).unwrap();
            assert_eq!(config.mac, expected, "{more}");
        }
    }

    #[test]
    fn requested_addresses_accumulate_without_doubles() {
        let config = parse_as(
            Command::Add,
            "IP=10.0.0.1",
            &json!({
                "args": { "cni": { "ips": ["10.0.0.2", "10.0.0.1/24"] } },
                "runtimeConfig": { "ips": ["fd00::1/64", "10.0.0.2"] },
            }),
        )
        .unwrap();
        let ips: Vec<_> = config.requested_ips.iter().map(IpAddr::to_string).collect();
        assert_eq!(ips, ["10.0.0.1", "10.0.0.2", "fd00::1"]);
    }

    /// A configuration that ADD refuses with this code, and what the message
    /// mentions.
    fn refused() -> Vec<(u32, Value, &'static str)> {
        vec![
            (7, json!({ "type": 5 }), "type is 5, must be a string"),
            (7, json!({ "bridge": "" }), "bridge is \"\""),
            (7, json!({ "bridge": "a/b" }), "bridge is \"a/b\""),
            (7, json!({ "bridge": 1 }), "bridge is 1, must be a string"),
            (
                7,
                json!({ "isGateway": "true" }),
                "isGateway is \"true\", must be true or false",
            ),
            (
                7,
                json!({ "preserveDefaultVlan": 1 }),
                "preserveDefaultVlan is 1",
            ),
            (
                7,
                json!({ "mtu": 67 }),
                "mtu is 67, must be 0 (the kernel's default) or a whole number from 68",
            ),
            (7, json!({ "mtu": 65536 }), "mtu is 65536"),
            (7, json!({ "mtu": -1 }), "mtu is -1"),
            (7, json!({ "mtu": 1500.5 }), "mtu is 1500.5"),
            (7, json!({ "mtu": "1500" }), "mtu is \"1500\""),
            (
                7,
                json!({ "hairpinMode": true, "promiscMode": true }),
                "promiscMode is true together with hairpinMode",
            ),
            (
                7,
                json!({ "ipMasqBackend": "pf" }),
                "ipMasqBackend is \"pf\"",
            ),
            (
                7,
                json!({ "ipMasqExempt": ["10.0.0.0/8", "10.0.0.1/8"] }),
                "ipMasqExempt[1] is \"10.0.0.1/8\", must be an IP prefix without bits beyond",
            ),
            (
                7,
                json!({ "ipMasqExempt": "10.0.0.0/8" }),
                "ipMasqExempt is \"10.0.0.0/8\"",
            ),
            (
                7,
                json!({ "ipMasqExempt": ["10.0.0.0/8"] }),
                "ipMasqExempt is a list with 10.0.0.0/8 without ipMasq, must be absent",
            ),
            (
                7,
                json!({ "ipMasqExempt": ["::1"], "ipMasq": false, "ipMasqBackend": "ebpf" }),
                "ipMasqExempt is a list with ::1/128 without ipMasq, must be absent",
            ),
            (
                7,
                json!({
                    "netfilter": "all", "isGateway": true,
                    "capabilities": { "mac": true, "PortMappings": true },
                }),
                "netfilter is \"all\" together with capabilities.portMappings, must be",
            ),
            (
                7,
                json!({ "capabilities": { "portMappings": "yes" } }),
                "capabilities.portMappings is \"yes\", must be true or false",
            ),
            (
                7,
                json!({ "netfilter": "some" }),
                "netfilter is \"some\", must be \"routed\"",
            ),
            (
                7,
                json!({ "netfilter": "all", "ipMasq": true }),
                "netfilter is \"all\" without isGateway, must be",
            ),
            (
                7,
                json!({ "netfilter": "none" }),
                "netfilter is \"none\" without ipMasq by eBPF, must be",
            ),
            (
                7,
                json!({ "netfilter": "none", "ipMasq": true, "ipMasqBackend": "nftables" }),
                "netfilter is \"none\" without ipMasq by eBPF, must be",
            ),
            (
                7,
                json!({
                    "netfilter": "all", "isGateway": true,
                    "runtimeConfig": { "portMappings": [{ "hostPort": 1, "containerPort": 1 }] },
                }),
                "netfilter is \"all\" together with runtimeConfig.portMappings, must be",
            ),
            (
                7,
                json!({ "disableContainerInterface": true, "ipam": { "type": "static" } }),
                "disableContainerInterface",
            ),
            (7, json!({ "ipam": [] }), "ipam is [], must be an object"),
            (7, json!({ "ipam": { "type": 5 } }), "ipam.type is 5"),
            (
                7,
                json!({ "ipam": { "subnet": "10.0.0.0/8" } }),
                "ipam.type is missing",
            ),
            (7, json!({ "vlan": 4095 }), "vlan is 4095"),
            (7, json!({ "vlanTrunk": {} }), "vlanTrunk is {}"),
            (2, json!({ "vlan": 100 }), "vlan is 100"),
            (
                2,
                json!({ "vlanTrunk": [{ "id": 5 }] }),
                "vlanTrunk is [{\"id\":5}]",
            ),
            (7, json!({ "runtimeConfig": [] }), "runtimeConfig is []"),
            (
                7,
                json!({ "runtimeConfig": { "mac": "x" } }),
                "runtimeConfig.mac is \"x\"",
            ),
            (
                7,
                json!({ "runtimeConfig": { "mac": "01:00:5e:00:00:01" } }),
                "runtimeConfig.mac",
            ),
            (
                7,
                json!({ "args": { "cni": { "mac": "00:00:00:00:00:00" } } }),
                "args.cni.mac",
            ),
            (
                7,
                json!({ "runtimeConfig": { "ips": ["10.0.0"] } }),
                "runtimeConfig.ips[0] is \"10.0.0\"",
            ),
            (
                7,
                json!({ "runtimeConfig": { "ips": "10.0.0.1" } }),
                "runtimeConfig.ips",
            ),
            (
                7,
                json!({ "runtimeConfig": { "ipRanges": 5 } }),
                "runtimeConfig.ipRanges",
            ),
            (
                7,
                json!({ "args": { "cni": { "labels": ["x"] } } }),
                "args.cni.labels[0]",
            ),
            (
                7,
                json!({ "dns": { "nameservers": "1.1.1.1" } }),
                "dns.nameservers",
            ),
            (
                7,
                json!({ "prevResult": { "ips": [{ "address": 5 }] } }),
                "prevResult.ips[0].address is 5",
            ),
            (
                7,
                json!({ "logLevel": "loud" }),
                "logLevel is \"loud\", must be \"off\", \"debug\"",
            ),
            (
                7,
                json!({ "logLevel": "info" }),
                "logLevel is \"info\", must be \"off\", \"debug\"",
            ),
        ]
    }

    #[test]
    fn invalid_values_name_key_value_and_what_would_be_right() {
        for (code, more, mention) in refused() {
            let error = parse(&more).unwrap_err();
            assert_eq!(u32::from(error.code), code, "{error}");
            assert!(
                error.msg.contains(mention),
                "{error} does not say {mention}"
            );
        }
    }

    #[test]
    fn del_ignores_what_add_refuses_unless_the_lease_needs_it() {
        for (_, more, mention) in refused() {
            let parsed = parse_as(Command::Del, "", &more);
            if mention.starts_with("ipam is") || mention.starts_with("ipam.type is 5") {
                assert_eq!(parsed.unwrap_err().code, ErrorCode::InvalidConfig, "{more}");
                continue;
            }
            let config = parsed.unwrap();
            assert_eq!(config.warnings.len(), 1, "{:?}", config.warnings);
            assert!(
                config.warnings[0].contains(mention),
                "{:?}",
                config.warnings
            );
        }
        let config = parse_as(Command::Del, "", &json!({ "bridge": "a/b" })).unwrap();
        assert_eq!(config.bridge, DEFAULT_BRIDGE);
    }

    #[test]
    fn ipam_absent_null_or_empty_is_a_network_without_addresses() {
        for ipam in [json!(null), json!({}), json!({ "type": "" })] {
            let config = parse(&json!({ "ipam": ipam })).unwrap();
            assert_eq!(config.ipam_type, None);
        }
    }

    #[test]
    fn check_needs_the_result_of_add() {
        let error = parse_as(Command::Check, "", &json!({})).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidConfig);
        assert!(error.msg.contains("prevResult"), "{error}");
        let with = json!({ "prevResult": { "cniVersion": "0.4.0", "ips": [{ "address": "10.0.0.1/8" }] } });
        let config = parse_as(Command::Check, "", &with).unwrap();
        assert_eq!(config.prev_result.unwrap().ips.len(), 1);
    }

    #[test]
    fn gc_reads_either_name_of_the_list() {
        let list = json!([{ "containerID": "a", "ifname": "eth0" }, { "CONTAINERID": "b", "IfName": "eth1" }]);
        for key in ["cni.dev/valid-attachments", "cni.dev/attachments"] {
            let config = parse_as(Command::Gc, "", &json!({ key: list })).unwrap();
            let ids: Vec<_> = config
                .valid_attachments
                .unwrap()
                .iter()
                .map(AttachmentId::to_string)
                .collect();
            assert_eq!(ids, ["a eth0", "b eth1"]);
        }
        let both = json!({ "cni.dev/valid-attachments": list, "cni.dev/attachments": [] });
        let config = parse_as(Command::Gc, "", &both).unwrap();
        assert_eq!(config.valid_attachments.unwrap().len(), 2);
    }

    #[test]
    fn delegated_plugins_get_the_very_bytes() {
        let stdin = br#" {"Name":"net", "name":"net2","x":1.0} "#.to_vec();
        let config =
            NetworkConfig::parse(stdin.clone(), Command::Del, &CniArgs::default()).unwrap();
        assert_eq!(config.stdin, stdin);
        assert_eq!(config.name, "net2");
        assert_eq!(config.cni_version, SpecVersion::V0_1_0);
    }

    proptest! {
        #[test]
        fn any_value_of_any_key_is_accepted_or_refused_by_name(
            key in prop::sample::select(vec![
                "bridge", "mtu", "isGateway", "vlan", "vlanTrunk", "ipam", "dns", "args",
                "runtimeConfig", "prevResult", "logLevel", "ipMasqBackend", "promiscMode",
                "snat", "conditionsV4", "markMasqBit", "uplinks", "xdpUplinks", "ipMasq",
                "ipMasqExempt", "netfilter",
            ]),
            value in prop_oneof![
                Just(json!(null)), any::<bool>().prop_map(Value::from), any::<i64>().prop_map(Value::from),
                any::<f64>().prop_map(Value::from), "\\PC{0,20}".prop_map(Value::from),
                Just(json!([])), Just(json!([5])), Just(json!({})), Just(json!({ "type": 1 })),
            ],
        ) {
            if let Err(error) = parse(&json!({ key: value })) {
                prop_assert!(error.msg.contains(key), "{}", error);
            }
            if key != "ipam" {
                let deleted = parse_as(Command::Del, "", &json!({ key: value }));
                prop_assert!(deleted.is_ok(), "{:?}", deleted);
            }
        }
    }
}
