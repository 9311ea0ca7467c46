//! Published ports: the capability `portMappings`, and the options of the stock
//! `portmap` plugin.

use std::{collections::HashMap, fmt, net::IpAddr, str::FromStr};

use super::{
    error::CniError,
    json::{Object, shown},
    names,
};

/// The numbers that a port can have on the wire.
const PORT_RANGE: std::ops::RangeInclusive<i64> = 1..=65535;

/// The mark of the stock `portmap` unless it is told another; to name it asks for
/// nothing.
const DEFAULT_MARK_BIT: i64 = 13;

/// A port of the node that leads to a port of the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortMapping {
    /// `hostPort`, never 0.
    pub host_port: u16,
    /// `containerPort`, never 0; of SCTP the same as `host_port`.
    pub container_port: u16,
    /// `protocol`
    pub protocol: Protocol,
    /// `hostIP`
    pub host_ip: HostIp,
}

impl PortMapping {
    /// Whether a packet could be meant for both.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.protocol == other.protocol
            && self.host_port == other.host_port
            && self.host_ip.overlaps(other.host_ip)
    }
}

impl fmt::Display for PortMapping {
    /// The node's side of it: `10.0.0.1:8080/tcp`, `[::]:53/udp`, `*:80/tcp`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (port, protocol) = (self.host_port, self.protocol);
        write!(f, "{}:{port}/{protocol}", self.host_ip)
    }
}

/// A transport protocol with ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// Its number in the IP header.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// Its name in a configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Protocol {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        [Self::Tcp, Self::Udp, Self::Sctp]
            .into_iter()
            .find(|protocol| protocol.name().eq_ignore_ascii_case(text))
            .ok_or(())
    }
}

/// Which of the node's addresses a port is published on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HostIp {
    /// All of them, of each family that the pod has an address of.
    Any,
    /// All IPv4 addresses.
    AnyV4,
    /// All IPv6 addresses.
    AnyV6,
    /// This one; of a loopback address only the node itself is a client. Never an
    /// IPv4 address in IPv6's notation (`::ffff:10.0.0.1`).
    Address(IpAddr),
}

impl HostIp {
    /// Whether an address could be meant by both.
    pub fn overlaps(self, other: Self) -> bool {
        match (self, other) {
            (Self::Address(one), Self::Address(two)) => one == two,
            (one, two) => {
                let family = |ip| match ip {
                    Self::Any => None,
                    Self::AnyV4 => Some(true),
                    Self::AnyV6 => Some(false),
                    Self::Address(address) => Some(address.is_ipv4()),
                };
                match (family(one), family(two)) {
                    (Some(one), Some(two)) => one == two,
                    _ => true,
                }
            }
        }
    }
}

impl fmt::Display for HostIp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::AnyV4 => f.write_str("0.0.0.0"),
            Self::AnyV6 => f.write_str("[::]"),
            Self::Address(IpAddr::V4(address)) => address.fmt(f),
            Self::Address(IpAddr::V6(address)) => write!(f, "[{address}]"),
        }
    }
}

impl FromStr for HostIp {
    type Err = ();

    /// Nothing that packets of others are sent to: multicast, broadcast.
    fn from_str(text: &str) -> Result<Self, ()> {
        if text.is_empty() {
            return Ok(Self::Any);
        }
        let address: IpAddr = text.parse().map_err(drop)?;
        Ok(match address.to_canonical() {
            IpAddr::V4(address) if address.is_unspecified() => Self::AnyV4,
            IpAddr::V6(address) if address.is_unspecified() => Self::AnyV6,
            IpAddr::V4(address) if address.is_broadcast() => return Err(()),
            address if address.is_multicast() => return Err(()),
            address => Self::Address(address),
        })
    }
}

/// `portMappings` of the runtime's configuration, in order; no two overlap.
pub(super) fn mappings(runtime: &Object<'_>) -> Result<Vec<PortMapping>, CniError> {
    const KEY: &str = "portMappings";
    let elements = runtime.objects(KEY)?;
    let mappings: Vec<_> = elements.iter().map(mapping).collect::<Result<_, _>>()?;
    let mut seen: HashMap<_, Vec<usize>> = HashMap::new();
    for (index, mapping) in mappings.iter().enumerate() {
        let others = seen
            .entry((mapping.protocol, mapping.host_port))
            .or_default();
        if let Some(&other) = others.iter().find(|&&i| mappings[i].overlaps(mapping)) {
            let path = |index| format!("{}[{index}]", runtime.path(KEY));
            return Err(CniError::invalid_config(
                &path(index),
                mapping,
                format!(
                    "another address or port than {}, {}",
                    path(other),
                    mappings[other]
                ),
            ));
        }
        others.push(index);
    }
    Ok(mappings)
}

fn mapping(element: &Object<'_>) -> Result<PortMapping, CniError> {
    let port = |key| {
        let expected = format!(
            "a whole number from {} to {}",
            PORT_RANGE.start(),
            PORT_RANGE.end()
        );
        element
            .int::<u16>(key, PORT_RANGE)?
            .ok_or_else(|| CniError::missing_config(&element.path(key), expected))
    };
    let (host_port, container_port) = (port("hostPort")?, port("containerPort")?);
    let protocol = element
        .parsed("protocol", "\"tcp\", \"udp\" or \"sctp\"")?
        .unwrap_or(Protocol::Tcp);
    if protocol == Protocol::Sctp && host_port != container_port {
        return Err(CniError::unsupported(
            &element.path("containerPort"),
            format!("{container_port} with hostPort {host_port}"),
            "the same number, as the checksum of SCTP covers the ports",
        ));
    }
    let host_ip = element
        .parsed(
            "hostIP",
            "a unicast IP address such as \"10.0.0.1\" or \"fd00::1\", without a zone, or \
             \"0.0.0.0\" or \"::\"",
        )?
        .unwrap_or(HostIp::Any);
    Ok(PortMapping {
        host_port,
        container_port,
        protocol,
        host_ip,
    })
}

/// Refuses what the stock `portmap` could be asked to do otherwise than it is
/// done here. To ask for the defaults is to ask for nothing.
pub(super) fn check_options(root: &Object<'_>) -> Result<(), CniError> {
    const ABSENT: &str = "none, as no mark is needed to find its packets";
    let refuse = |key, supported| {
        let value = root.get(key).map(shown).unwrap_or_default();
        Err(CniError::unsupported(key, value, supported))
    };
    if root.bool("snat")? == Some(false) {
        return refuse(
            "snat",
            "true: a pod that reaches itself needs another source address",
        );
    }
    if root.bool("masqAll")? == Some(true) {
        return refuse("masqAll", "false: the pod sees the client's own address");
    }
    for key in ["conditionsV4", "conditionsV6"] {
        if !root.array(key)?.is_empty() {
            return refuse(
                key,
                "an empty list, as there is no rule for them to stand in; hostIP limits what is \
                 published",
            );
        }
    }
    let bit: Option<i64> = root.int("markMasqBit", 0..=31)?;
    if bit.is_some_and(|bit| bit != DEFAULT_MARK_BIT) {
        return refuse("markMasqBit", ABSENT);
    }
    if root.non_empty("externalSetMarkChain")?.is_some() {
        return refuse("externalSetMarkChain", ABSENT);
    }
    if root.non_empty("backend")?.is_some() {
        return refuse(
            "backend",
            "none, as no rules are written; the portmap plugin may be given the capability \
             portMappings instead",
        );
    }
    Ok(())
}

/// The names of devices that `key` lists, none twice; `None` if it is absent.
pub(super) fn devices(root: &Object<'_>, key: &str) -> Result<Option<Vec<String>>, CniError> {
    if root.get(key).is_none() {
        return Ok(None);
    }
    let mut names: Vec<String> = Vec::new();
    for (index, value) in root.array(key)?.iter().enumerate() {
        let name = value.as_str().ok_or("the name of an interface");
        let checked = name.and_then(|name| match names::check_ifname(name) {
            Ok(()) if name == "lo" => Err("a device that others reach the node by"),
            Ok(()) => Ok(name),
            Err(expected) => Err(expected),
        });
        match checked {
            Ok(name) if names.iter().any(|other| other == name) => {}
            Ok(name) => names.push(name.to_owned()),
            Err(expected) => {
                let path = format!("{}[{index}]", root.path(key));
                return Err(CniError::invalid_config(&path, shown(value), expected));
            }
        }
    }
    Ok(Some(names))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::cni::{
        config::NetworkConfig,
        env::{CniArgs, Command},
    };

    fn parse_as(command: Command, more: &Value) -> Result<NetworkConfig, CniError> {
        let mut config = json!({
            "cniVersion": "1.1.0", "name": "net", "type": "bpf-bridge",
            "prevResult": {}, "cni.dev/valid-attachments": [],
        });
        for (key, value) in more.as_object().unwrap() {
            config[key] = value.clone();
        }
        let stdin = config.to_string().into_bytes();
        NetworkConfig::parse(stdin, command, &CniArgs::default())
    }

    fn published(mappings: &Value) -> Result<Vec<PortMapping>, CniError> {
        let more = json!({ "runtimeConfig": { "portMappings": mappings } });
        parse_as(Command::Add, &more).map(|config| config.port_mappings)
    }

    fn address(text: &str) -> HostIp {
        HostIp::Address(text.parse().unwrap())
    }

    #[test]
    fn mappings_are_read_as_runtimes_write_them() {
        // Podman's and nerdctl's, then containerd's.
        let mappings = published(&json!([
            { "hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "10.0.0.1" },
            { "HostPort": 53, "ContainerPort": 5353, "Protocol": "UDP", "HostIP": "" },
            { "hostPort": 65535, "containerPort": 1 },
            { "hostPort": 9, "containerPort": 9, "protocol": "Sctp", "hostIP": null },
        ]))
        .unwrap();
        let all = |host_port, container_port, protocol, host_ip| PortMapping {
            host_port,
            container_port,
            protocol,
            host_ip,
        };
        assert_eq!(
            mappings,
            [
                all(8080, 80, Protocol::Tcp, address("10.0.0.1")),
                all(53, 5353, Protocol::Udp, HostIp::Any),
                all(65535, 1, Protocol::Tcp, HostIp::Any),
                all(9, 9, Protocol::Sctp, HostIp::Any),
            ]
        );
        let shown: Vec<_> = mappings.iter().map(PortMapping::to_string).collect();
        assert_eq!(
            shown,
            ["10.0.0.1:8080/tcp", "*:53/udp", "*:65535/tcp", "*:9/sctp"]
        );
        for nothing in [json!(null), json!([])] {
            assert_eq!(published(&nothing), Ok(Vec::new()));
        }
    }

    #[test]
    fn host_addresses_are_told_apart() {
        for (text, expected, shown) in [
            ("", HostIp::Any, "*"),
            ("0.0.0.0", HostIp::AnyV4, "0.0.0.0"),
            ("::ffff:0.0.0.0", HostIp::AnyV4, "0.0.0.0"),
            ("::", HostIp::AnyV6, "[::]"),
            ("0:0::0", HostIp::AnyV6, "[::]"),
            ("127.0.0.1", address("127.0.0.1"), "127.0.0.1"),
            ("::1", address("::1"), "[::1]"),
            ("::ffff:10.0.0.1", address("10.0.0.1"), "10.0.0.1"),
            ("fe80::1", address("fe80::1"), "[fe80::1]"),
        ] {
            let found: HostIp = text.parse().unwrap();
            assert_eq!((found, found.to_string().as_str()), (expected, shown));
        }
    }

    #[test]
    fn protocols_have_their_numbers() {
        for (protocol, name, number) in [
            (Protocol::Tcp, "tcp", 6),
            (Protocol::Udp, "udp", 17),
            (Protocol::Sctp, "sctp", 132),
        ] {
            assert_eq!((protocol.name(), protocol.number()), (name, number));
            assert_eq!(name.to_uppercase().parse(), Ok(protocol));
        }
    }

    /// One of four entries with the same number, on these addresses.
    fn on(protocol: &str, host_ip: &str, container_port: u16) -> Value {
        json!({
            "hostPort": 80, "containerPort": container_port,
            "protocol": protocol, "hostIP": host_ip,
        })
    }

    #[test]
    fn one_number_on_addresses_apart_is_several_ports() {
        let apart = json!([
            on("tcp", "10.0.0.1", 1),
            on("tcp", "10.0.0.2", 2),
            on("tcp", "127.0.0.1", 3),
            on("tcp", "::", 4),
            on("udp", "", 5),
            on("sctp", "0.0.0.0", 80),
        ]);
        assert_eq!(published(&apart).unwrap().len(), 6);
        let families = json!([on("tcp", "0.0.0.0", 1), on("tcp", "::", 2)]);
        assert_eq!(published(&families).unwrap().len(), 2);
    }

    #[test]
    fn overlaps_name_both() {
        for (one, two) in [
            ("", ""),
            ("", "::"),
            ("", "0.0.0.0"),
            ("", "10.0.0.1"),
            ("", "::1"),
            ("::", "::"),
            ("::", "fd00::1"),
            ("0.0.0.0", "127.0.0.1"),
            ("0.0.0.0", "::ffff:10.0.0.1"),
            ("10.0.0.1", "::ffff:10.0.0.1"),
        ] {
            for (one, two) in [(one, two), (two, one)] {
                let list = json!([
                    on("tcp", one, 1),
                    on("udp", one, 1),
                    { "hostPort": 81, "containerPort": 1 },
                    on("TCP", two, 1),
                ]);
                let error = published(&list).unwrap_err();
                let shown = |text: &str| format!("{}:80/tcp", text.parse::<HostIp>().unwrap());
                let expected = format!(
                    "runtimeConfig.portMappings[3] is {}, must be another address or port than \
                     runtimeConfig.portMappings[0], {}",
                    shown(two),
                    shown(one)
                );
                assert_eq!(u32::from(error.code), 7, "{error}");
                assert!(error.msg.ends_with(&expected), "{error}");
            }
        }
    }

    /// What ADD refuses with this code, and what the message mentions.
    fn refused() -> Vec<(u32, Value, &'static str)> {
        let mapping = |key: &str, value: Value| {
            let mut mapping = json!({ "hostPort": 8080, "containerPort": 80 });
            mapping[key] = value;
            json!({ "runtimeConfig": { "portMappings": [mapping] } })
        };
        vec![
            (
                7,
                json!({ "runtimeConfig": { "portMappings": {} } }),
                "runtimeConfig.portMappings is {}, must be an array",
            ),
            (
                7,
                json!({ "runtimeConfig": { "portMappings": ["8080:80"] } }),
                "runtimeConfig.portMappings[0] is \"8080:80\", must be an object",
            ),
            (
                7,
                json!({ "runtimeConfig": { "portMappings": [{ "hostPort": 80 }] } }),
                "runtimeConfig.portMappings[0].containerPort is missing",
            ),
            (
                7,
                mapping("hostPort", json!(0)),
                "portMappings[0].hostPort is 0, must be a whole number from 1 to 65535",
            ),
            (7, mapping("hostPort", json!(-1)), "hostPort is -1"),
            (7, mapping("hostPort", json!(65536)), "hostPort is 65536"),
            (7, mapping("hostPort", json!(80.5)), "hostPort is 80.5"),
            (7, mapping("hostPort", json!("80")), "hostPort is \"80\""),
            (7, mapping("containerPort", json!(0)), "containerPort is 0"),
            (
                7,
                mapping("protocol", json!("icmp")),
                "protocol is \"icmp\", must be \"tcp\", \"udp\" or \"sctp\"",
            ),
            (7, mapping("protocol", json!(6)), "protocol is 6"),
            (
                2,
                mapping("protocol", json!("sctp")),
                "containerPort is 80 with hostPort 8080; supported is the same number, as the \
                 checksum of SCTP covers the ports",
            ),
            (7, mapping("hostIP", json!("node1")), "hostIP is \"node1\""),
            (7, mapping("hostIP", json!("10.0.0.1/24")), "hostIP is"),
            (7, mapping("hostIP", json!("224.0.0.1")), "hostIP is"),
            (7, mapping("hostIP", json!("ff02::1")), "hostIP is"),
            (7, mapping("hostIP", json!("::ffff:224.0.0.1")), "hostIP is"),
            (7, mapping("hostIP", json!("255.255.255.255")), "hostIP is"),
            (
                7,
                mapping("hostIP", json!("fe80::1%eth0")),
                "hostIP is \"fe80::1%eth0\", must be a unicast IP address such as \"10.0.0.1\" or \
                 \"fd00::1\", without a zone",
            ),
            (
                2,
                json!({ "snat": false }),
                "snat is false; supported is true",
            ),
            (7, json!({ "snat": "no" }), "snat is \"no\""),
            (
                2,
                json!({ "masqAll": true }),
                "masqAll is true; supported is false",
            ),
            (
                2,
                json!({ "conditionsV4": ["!", "-d", "10.0.0.0/8"] }),
                "conditionsV4 is [\"!\",\"-d\",\"10.0.0.0/8\"]; supported is an empty list",
            ),
            (2, json!({ "ConditionsV6": ["x"] }), "conditionsV6 is"),
            (7, json!({ "conditionsV6": "x" }), "conditionsV6 is \"x\""),
            (
                2,
                json!({ "markMasqBit": 5 }),
                "markMasqBit is 5; supported is none",
            ),
            (7, json!({ "markMasqBit": 32 }), "markMasqBit is 32"),
            (
                2,
                json!({ "externalSetMarkChain": "KUBE-MARK-MASQ" }),
                "externalSetMarkChain is \"KUBE-MARK-MASQ\"; supported is none",
            ),
            (
                2,
                json!({ "backend": "iptables" }),
                "backend is \"iptables\"; supported is none",
            ),
            (7, json!({ "uplinks": "eth0" }), "uplinks is \"eth0\""),
            (7, json!({ "uplinks": ["eth0", 5] }), "uplinks[1] is 5"),
            (7, json!({ "uplinks": ["a/b"] }), "uplinks[0] is \"a/b\""),
            (
                7,
                json!({ "uplinks": ["lo"] }),
                "uplinks[0] is \"lo\", must be a device that others reach the node by",
            ),
            (7, json!({ "xdpUplinks": [""] }), "xdpUplinks[0] is \"\""),
        ]
    }

    #[test]
    fn what_cannot_be_published_is_refused_by_name() {
        for (code, more, mention) in refused() {
            for command in [Command::Add, Command::Status] {
                let error = parse_as(command, &more).unwrap_err();
                assert_eq!(u32::from(error.code), code, "{error}");
                assert!(
                    error.msg.contains(mention),
                    "{error} does not say {mention}"
                );
            }
        }
    }

    #[test]
    fn what_was_never_published_is_in_nobodys_way() {
        for (_, more, mention) in refused() {
            for command in [Command::Del, Command::Gc, Command::Check] {
                let config = parse_as(command, &more).unwrap();
                assert_eq!(config.port_mappings, []);
                assert_eq!(config.warnings.len(), 1, "{:?}", config.warnings);
                assert!(config.warnings[0].contains(mention));
            }
        }
    }

    #[test]
    fn options_that_ask_for_nothing_are_fine() {
        let config = parse_as(
            Command::Add,
            &json!({
                "snat": true, "masqAll": false, "conditionsV4": [], "conditionsV6": null,
                "markMasqBit": 13, "externalSetMarkChain": "", "backend": null,
                "runtimeConfig": { "portMappings": [{ "hostPort": 80, "containerPort": 80 }] },
            }),
        )
        .unwrap();
        assert_eq!(config.warnings, [""; 0]);
        assert_eq!(config.port_mappings.len(), 1);
    }

    #[test]
    fn uplinks_are_found_unless_they_are_named() {
        let config = parse_as(Command::Add, &json!({})).unwrap();
        assert_eq!((config.uplinks, config.xdp_uplinks.len()), (None, 0));
        let config = parse_as(Command::Add, &json!({ "uplinks": [] })).unwrap();
        assert_eq!(config.uplinks, Some(Vec::new()));
        let config = parse_as(
            Command::Add,
            &json!({ "Uplinks": ["eth0", "bond0.5", "eth0"], "XDPuplinks": ["eth1"] }),
        )
        .unwrap();
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        assert_eq!(config.uplinks, Some(names(&["eth0", "bond0.5"])));
        assert_eq!(config.xdp_uplinks, names(&["eth1"]));
    }

    fn any_host_ip() -> impl Strategy<Value = HostIp> {
        prop_oneof![
            Just(HostIp::Any),
            Just(HostIp::AnyV4),
            Just(HostIp::AnyV6),
            prop::sample::select(vec!["10.0.0.1", "127.0.0.1", "fd00::1", "::1"]).prop_map(address),
        ]
    }

    /// The addresses that are meant, of those that [`any_host_ip`] makes.
    fn meant(host_ip: HostIp) -> Vec<IpAddr> {
        ["10.0.0.1", "127.0.0.1", "fd00::1", "::1"]
            .into_iter()
            .map(|text| text.parse::<IpAddr>().unwrap())
            .filter(|address| match host_ip {
                HostIp::Any => true,
                HostIp::AnyV4 => address.is_ipv4(),
                HostIp::AnyV6 => address.is_ipv6(),
                HostIp::Address(this) => this == *address,
            })
            .collect()
    }

    proptest! {
        #[test]
        fn addresses_overlap_if_one_could_be_meant_by_both(
            one in any_host_ip(), two in any_host_ip(),
        ) {
            let common = meant(one).iter().any(|address| meant(two).contains(address));
            prop_assert_eq!(one.overlaps(two), common);
        }

        #[test]
        fn any_value_of_a_mapping_is_accepted_or_refused_by_name(
            key in prop::sample::select(vec!["hostPort", "containerPort", "protocol", "hostIP"]),
            value in prop_oneof![
                Just(json!(null)), any::<i64>().prop_map(Value::from), any::<f64>().prop_map(Value::from),
                "\\PC{0,20}".prop_map(Value::from), Just(json!([])), Just(json!({})),
            ],
        ) {
            let mut mapping = json!({ "hostPort": 80, "containerPort": 80 });
            mapping[key] = value;
            match published(&json!([mapping])) {
                Ok(mappings) => prop_assert_eq!(mappings.len(), 1),
                Err(error) => prop_assert!(error.msg.contains(key), "{}", error),
            }
        }
    }
}
