//! The result of ADD, in the model of the newest version.
//!
//! Every version's result is read into this model and written out of it, so the
//! rest of the plugin knows one shape. Conversions are libcni's (pkg/types/100,
//! 040 and 020 of containernetworking/cni v1.3.0).

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Map, Value, json};

use super::{
    error::{CniError, ErrorCode},
    json::Object,
    version::SpecVersion,
};

/// What an attachment has: spec section 5, "ADD Success".
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CniResult {
    /// Every interface that the attachment made or uses, host side and container
    /// side.
    pub interfaces: Vec<Interface>,
    /// Every address that was assigned.
    pub ips: Vec<IpConfig>,
    /// Every route that was added in the container.
    pub routes: Vec<Route>,
    /// Name resolution for the container.
    pub dns: Dns,
    /// Keys of a `prevResult` that no version knows, passed through.
    pub extra: Map<String, Value>,
}

/// An interface of a result.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Interface {
    /// Its name in its namespace.
    pub name: String,
    /// Its link-layer address; of any kind of link, so a string.
    pub mac: Option<String>,
    /// Its MTU in bytes (since 1.1.0).
    pub mtu: Option<u32>,
    /// The path of the namespace that it is in; `None` is the host's.
    pub sandbox: Option<String>,
    /// The socket file of a vhost-user interface (since 1.1.0).
    pub socket_path: Option<String>,
    /// The PCI device that backs it (since 1.1.0).
    pub pci_id: Option<String>,
    /// Keys that no version knows, passed through.
    pub extra: Map<String, Value>,
}

/// An address of a result.
#[derive(Clone, Debug, PartialEq)]
pub struct IpConfig {
    /// The address itself with its prefix length; host bits are kept.
    pub address: IpNet,
    /// The default gateway of its subnet, if there is one.
    pub gateway: Option<IpAddr>,
    /// The index of its interface in [`CniResult::interfaces`].
    pub interface: Option<usize>,
    /// Keys that no version knows, passed through.
    pub extra: Map<String, Value>,
}

impl IpConfig {
    /// An address without gateway and interface.
    pub fn new(address: IpNet) -> Self {
        Self {
            address,
            gateway: None,
            interface: None,
            extra: Map::new(),
        }
    }
}

/// A route of a result.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// Where to.
    pub dst: IpNet,
    /// The next hop; `None` is the gateway of the address of the same family.
    pub gw: Option<IpAddr>,
    /// The MTU along the path, in bytes (since 1.1.0).
    pub mtu: Option<u32>,
    /// The MSS to advertise, in bytes (since 1.1.0).
    pub advmss: Option<u32>,
    /// The metric; a smaller one is preferred (since 1.1.0).
    pub priority: Option<u32>,
    /// The routing table; 0 is a table too (since 1.1.0).
    pub table: Option<u32>,
    /// The scope, an `rtm_scope` such as 253 for link; 0, global, is meaningful
    /// (since 1.1.0).
    pub scope: Option<u8>,
    /// Keys that no version knows, passed through.
    pub extra: Map<String, Value>,
}

impl Route {
    /// A route without attributes.
    pub fn new(dst: IpNet, gw: Option<IpAddr>) -> Self {
        Self {
            dst,
            gw,
            mtu: None,
            advmss: None,
            priority: None,
            table: None,
            scope: None,
            extra: Map::new(),
        }
    }
}

/// Name resolution: `dns` of a configuration and of a result.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dns {
    /// Name servers, first to be asked first.
    pub nameservers: Vec<String>,
    /// The local domain.
    pub domain: Option<String>,
    /// Domains to search for short names.
    pub search: Vec<String>,
    /// Options of the resolver.
    pub options: Vec<String>,
}

const RESULT_KEYS: &[&str] = &[
    "cniVersion",
    "interfaces",
    "ips",
    "routes",
    "dns",
    "ip4",
    "ip6",
];
const INTERFACE_KEYS: &[&str] = &["name", "mac", "mtu", "sandbox", "socketPath", "pciID"];
const IP_KEYS: &[&str] = &["version", "address", "gateway", "interface"];
const ROUTE_KEYS: &[&str] = &["dst", "gw", "mtu", "advmss", "priority", "table", "scope"];

const AN_ADDRESS: &str = "an IP address such as 10.1.2.3";
const A_CIDR: &str = "an IP address and prefix length such as 10.1.2.3/24";
/// `interface` indexes a list that is in memory; more is nonsense.
const INDEX_MAX: i64 = i32::MAX as i64;

impl Dns {
    /// Whether nothing is set.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Reads a `dns` object.
    ///
    /// # Errors
    ///
    /// A key holds a value of the wrong type.
    pub fn from_object(object: &Object<'_>) -> Result<Self, CniError> {
        Ok(Self {
            nameservers: object.list("nameservers", "a string")?,
            domain: object.non_empty("domain")?.map(str::to_owned),
            search: object.list("search", "a string")?,
            options: object.list("options", "a string")?,
        })
    }

    fn to_json(&self) -> Value {
        let mut object = Map::new();
        let mut list = |key: &str, values: &[String]| {
            if !values.is_empty() {
                object.insert(key.to_owned(), values.into());
            }
        };
        list("nameservers", &self.nameservers);
        list("search", &self.search);
        list("options", &self.options);
        put(&mut object, "domain", self.domain.as_deref());
        Value::Object(object)
    }
}

/// Inserts what is there.
fn put(object: &mut Map<String, Value>, key: &str, value: Option<impl Into<Value>>) {
    if let Some(value) = value {
        object.insert(key.to_owned(), value.into());
    }
}

fn owned(text: Option<&str>) -> Option<String> {
    text.map(str::to_owned)
}

impl Interface {
    fn from_object(object: &Object<'_>) -> Result<Self, CniError> {
        Ok(Self {
            name: object.str("name")?.unwrap_or_default().to_owned(),
            mac: owned(object.non_empty("mac")?),
            mtu: object
                .int("mtu", 0..=i64::from(u32::MAX))?
                .filter(|mtu| *mtu != 0),
            sandbox: owned(object.non_empty("sandbox")?),
            socket_path: owned(object.non_empty("socketPath")?),
            pci_id: owned(object.non_empty("pciID")?),
            extra: object.unknown(INTERFACE_KEYS),
        })
    }

    fn to_json(&self, version: SpecVersion) -> Value {
        let mut object = self.extra.clone();
        object.insert("name".to_owned(), self.name.as_str().into());
        put(&mut object, "mac", self.mac.as_deref());
        put(&mut object, "sandbox", self.sandbox.as_deref());
        if version >= SpecVersion::V1_0_0 {
            put(&mut object, "mtu", self.mtu);
            put(&mut object, "socketPath", self.socket_path.as_deref());
            put(&mut object, "pciID", self.pci_id.as_deref());
        }
        Value::Object(object)
    }
}

impl IpConfig {
    fn from_object(object: &Object<'_>) -> Result<Self, CniError> {
        Ok(Self {
            address: required_cidr(object, "address")?,
            gateway: object.parsed("gateway", AN_ADDRESS)?,
            interface: object.int("interface", 0..=INDEX_MAX)?,
            extra: object.unknown(IP_KEYS),
        })
    }

    fn to_json(&self, version: SpecVersion) -> Value {
        let mut object = self.extra.clone();
        if version < SpecVersion::V1_0_0 {
            let family = if self.address.addr().is_ipv4() {
                "4"
            } else {
                "6"
            };
            object.insert("version".to_owned(), family.into());
        }
        object.insert("address".to_owned(), self.address.to_string().into());
        put(
            &mut object,
            "gateway",
            self.gateway.map(|gw| gw.to_string()),
        );
        put(&mut object, "interface", self.interface);
        Value::Object(object)
    }
}

impl Route {
    /// Reads one element of a `routes` array, of a result or of an IPAM
    /// configuration.
    ///
    /// # Errors
    ///
    /// `dst` is missing, or a key holds a value of the wrong type.
    pub fn from_object(object: &Object<'_>) -> Result<Self, CniError> {
        let number = |key| object.int::<u32>(key, 0..=i64::from(u32::MAX));
        Ok(Self {
            dst: required_cidr(object, "dst")?,
            gw: object.parsed("gw", AN_ADDRESS)?,
            // libcni cannot tell 0 from absent in these three.
            mtu: number("mtu")?.filter(|mtu| *mtu != 0),
            advmss: number("advmss")?.filter(|advmss| *advmss != 0),
            priority: number("priority")?.filter(|priority| *priority != 0),
            table: number("table")?,
            scope: object.int("scope", 0..=i64::from(u8::MAX))?,
            extra: object.unknown(ROUTE_KEYS),
        })
    }

    fn to_json(&self) -> Value {
        let mut object = self.extra.clone();
        object.insert("dst".to_owned(), self.dst.to_string().into());
        put(&mut object, "gw", self.gw.map(|gw| gw.to_string()));
        put(&mut object, "mtu", self.mtu);
        put(&mut object, "advmss", self.advmss);
        put(&mut object, "priority", self.priority);
        put(&mut object, "table", self.table);
        put(&mut object, "scope", self.scope);
        Value::Object(object)
    }
}

fn required_cidr(object: &Object<'_>, key: &str) -> Result<IpNet, CniError> {
    object
        .parsed(key, A_CIDR)?
        .ok_or_else(|| CniError::missing_config(&object.path(key), A_CIDR))
}

impl CniResult {
    /// Reads a result of any version. `path` leads the keys in errors
    /// (`prevResult`); `default` is the version of a result that names none: a
    /// plugin answers in the configuration's version.
    ///
    /// # Errors
    ///
    /// Code 1 for an unknown version; code 7 for a missing or ill-typed value.
    pub fn from_json(value: &Value, path: &str, default: SpecVersion) -> Result<Self, CniError> {
        let object = Object::new(value, path)?;
        let version = match object.non_empty("cniVersion")? {
            Some(text) => text
                .parse()
                .map_err(|e: CniError| e.context(format!("reading {path}")))?,
            None => default,
        };
        let mut result = Self {
            dns: Dns::from_object(&object.object("dns")?)?,
            extra: object.unknown(RESULT_KEYS),
            ..Self::default()
        };
        if version < SpecVersion::V0_3_0 {
            for key in ["ip4", "ip6"] {
                if object.get(key).is_some() {
                    result.read_family(&object.object(key)?)?;
                }
            }
            return Ok(result);
        }
        for interface in object.objects("interfaces")? {
            result.interfaces.push(Interface::from_object(&interface)?);
        }
        for ip in object.objects("ips")? {
            result.ips.push(IpConfig::from_object(&ip)?);
        }
        for route in object.objects("routes")? {
            result.routes.push(Route::from_object(&route)?);
        }
        Ok(result)
    }

    /// Reads `ip4` or `ip6` of a result before 0.3.0.
    fn read_family(&mut self, object: &Object<'_>) -> Result<(), CniError> {
        self.ips.push(IpConfig {
            gateway: object.parsed("gateway", AN_ADDRESS)?,
            ..IpConfig::new(required_cidr(object, "ip")?)
        });
        for route in object.objects("routes")? {
            self.routes.push(Route::from_object(&route)?);
        }
        Ok(())
    }

    /// This result behind that of the plugins before this one in the chain: what
    /// ADD answers where it got a `prevResult`.
    #[must_use]
    pub fn after(mut self, prev: Self) -> Self {
        let mut all = prev;
        for ip in &mut self.ips {
            ip.interface = ip.interface.map(|index| index + all.interfaces.len());
        }
        all.interfaces.extend(self.interfaces);
        all.ips.extend(self.ips);
        all.routes.extend(self.routes);
        all.extra.extend(self.extra);
        if !self.dns.is_empty() {
            all.dns = self.dns;
        }
        all
    }

    /// Writes the result as `version` has it. What an older version cannot carry
    /// is left out.
    ///
    /// # Errors
    ///
    /// Code 1 if `version` is before 0.3.0 and there is no address: such a
    /// result would say nothing.
    pub fn to_json(&self, version: SpecVersion) -> Result<Value, CniError> {
        let mut object = self.extra.clone();
        object.insert("cniVersion".to_owned(), version.as_str().into());
        if !self.dns.is_empty() {
            object.insert("dns".to_owned(), self.dns.to_json());
        }
        if version < SpecVersion::V0_3_0 {
            self.write_families(&mut object, version)?;
            return Ok(Value::Object(object));
        }
        let mut list = |key: &str, values: Vec<Value>| {
            if !values.is_empty() {
                object.insert(key.to_owned(), Value::Array(values));
            }
        };
        let interfaces = self.interfaces.iter();
        list(
            "interfaces",
            interfaces.map(|i| i.to_json(version)).collect(),
        );
        list(
            "ips",
            self.ips.iter().map(|ip| ip.to_json(version)).collect(),
        );
        list("routes", self.routes.iter().map(Route::to_json).collect());
        Ok(Value::Object(object))
    }

    /// Writes `ip4` and `ip6` of a result before 0.3.0: the first address of each
    /// family, with the routes of that family.
    fn write_families(
        &self,
        object: &mut Map<String, Value>,
        version: SpecVersion,
    ) -> Result<(), CniError> {
        if self.ips.is_empty() {
            return Err(CniError::new(
                ErrorCode::IncompatibleVersion,
                "cannot convert: no valid IP addresses",
            )
            .with_details(format!(
                "a result of version {version} cannot tell of an attachment without an address, \
                 cniVersion 0.3.0 or later can"
            )));
        }
        for (key, is_ipv4) in [("ip4", true), ("ip6", false)] {
            let of_family = |net: &IpNet| net.addr().is_ipv4() == is_ipv4;
            let Some(ip) = self.ips.iter().find(|ip| of_family(&ip.address)) else {
                continue;
            };
            let mut family = Map::new();
            family.insert("ip".to_owned(), ip.address.to_string().into());
            put(&mut family, "gateway", ip.gateway.map(|gw| gw.to_string()));
            let routes = self.routes.iter().filter(|route| of_family(&route.dst));
            let routes: Vec<_> = routes
                .map(|route| {
                    let mut object = json!({ "dst": route.dst.to_string() });
                    if let Some(gw) = route.gw {
                        object["gw"] = gw.to_string().into();
                    }
                    object
                })
                .collect();
            if !routes.is_empty() {
                family.insert("routes".to_owned(), Value::Array(routes));
            }
            object.insert(key.to_owned(), Value::Object(family));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn full() -> CniResult {
        let value = json!({
            "cniVersion": "1.1.0",
            "interfaces": [
                { "name": "cni0", "mac": "02:00:00:00:00:01" },
                { "name": "eth0", "mac": "02:00:00:00:00:02", "mtu": 1500, "sandbox": "/run/netns/c",
                  "socketPath": "/s", "pciID": "0000:00:01.0", "vendor": 7 },
            ],
            "ips": [
                { "address": "10.1.2.3/24", "gateway": "10.1.2.1", "interface": 1 },
                { "address": "10.9.9.9/32" },
                { "address": "fd00::3/64", "gateway": "fd00::1", "interface": 1 },
            ],
            "routes": [
                { "dst": "0.0.0.0/0", "gw": "10.1.2.1", "mtu": 1400, "advmss": 1360, "priority": 10,
                  "table": 0, "scope": 0 },
                { "dst": "fd01::/64" },
            ],
            "dns": { "nameservers": ["10.1.2.1"], "domain": "d", "search": ["s"], "options": ["o"] },
            "vendor": { "x": 1 },
        });
        CniResult::from_json(&value, "result", SpecVersion::LATEST).unwrap()
    }

    #[test]
    fn the_newest_shape_round_trips() {
        let full = full();
        assert_eq!(full.interfaces[1].mtu, Some(1500));
        assert_eq!(full.routes[0].table, Some(0));
        assert_eq!(full.routes[0].scope, Some(0));
        assert_eq!(full.routes[1].table, None);
        for version in [SpecVersion::V1_0_0, SpecVersion::V1_1_0] {
            let json = full.to_json(version).unwrap();
            assert_eq!(json["cniVersion"], version.as_str());
            assert_eq!(json["interfaces"][1]["socketPath"], "/s");
            assert_eq!(json["interfaces"][1]["vendor"], 7);
            assert_eq!(json["vendor"]["x"], 1);
            assert_eq!(json["ips"][0].get("version"), None);
            assert_eq!(
                CniResult::from_json(&json, "r", SpecVersion::V0_1_0),
                Ok(full.clone())
            );
        }
    }

    #[test]
    fn before_1_0_addresses_have_a_version_and_interfaces_less() {
        for version in [
            SpecVersion::V0_3_0,
            SpecVersion::V0_3_1,
            SpecVersion::V0_4_0,
        ] {
            let json = full().to_json(version).unwrap();
            assert_eq!(
                json["ips"],
                json!([
                    { "version": "4", "address": "10.1.2.3/24", "gateway": "10.1.2.1", "interface": 1 },
                    { "version": "4", "address": "10.9.9.9/32" },
                    { "version": "6", "address": "fd00::3/64", "gateway": "fd00::1", "interface": 1 },
                ])
            );
            for key in ["mtu", "socketPath", "pciID"] {
                assert_eq!(json["interfaces"][1].get(key), None);
            }
            assert_eq!(json["interfaces"][1]["sandbox"], "/run/netns/c");
            assert_eq!(
                json["routes"][0]["advmss"], 1360,
                "as libcni, routes keep all"
            );
        }
    }

    #[test]
    fn before_0_3_one_address_per_family_is_left() {
        for version in [SpecVersion::V0_1_0, SpecVersion::V0_2_0] {
            assert_eq!(
                full().to_json(version).unwrap(),
                json!({
                    "cniVersion": version.as_str(),
                    "ip4": { "ip": "10.1.2.3/24", "gateway": "10.1.2.1",
                             "routes": [{ "dst": "0.0.0.0/0", "gw": "10.1.2.1" }] },
                    "ip6": { "ip": "fd00::3/64", "gateway": "fd00::1",
                             "routes": [{ "dst": "fd01::/64" }] },
                    "dns": { "nameservers": ["10.1.2.1"], "domain": "d", "search": ["s"],
                             "options": ["o"] },
                    "vendor": { "x": 1 },
                })
            );
            let one_family = CniResult {
                ips: vec![IpConfig::new("fd00::3/64".parse().unwrap())],
                routes: full().routes,
                ..CniResult::default()
            };
            let json = one_family.to_json(version).unwrap();
            assert_eq!(
                json.get("ip4"),
                None,
                "routes of a family without address are left out"
            );
            let error = CniResult::default().to_json(version).unwrap_err();
            assert!(error.msg.contains("no valid IP addresses"), "{error}");
        }
    }

    #[test]
    fn a_result_is_put_behind_the_previous_one() {
        let own = CniResult {
            interfaces: vec![Interface {
                name: "net1".to_owned(),
                ..Interface::default()
            }],
            ips: vec![
                IpConfig {
                    interface: Some(0),
                    ..IpConfig::new("10.7.0.2/24".parse().unwrap())
                },
                IpConfig::new("10.7.0.3/24".parse().unwrap()),
            ],
            ..CniResult::default()
        };
        let all = own.clone().after(full());
        let named: Vec<_> = all.ips.iter().map(|ip| ip.interface).collect();
        assert_eq!(named, [Some(1), None, Some(1), Some(2), None]);
        assert_eq!(all.interfaces[2].name, "net1");
        assert_eq!(all.dns, full().dns);
        assert_eq!(all.extra, full().extra);
        assert_eq!(own.clone().after(CniResult::default()), own);
        assert_eq!(CniResult::default().after(full()), full());
    }

    #[test]
    fn empty_parts_are_omitted() {
        for version in &SpecVersion::SUPPORTED[2..] {
            let json = CniResult::default().to_json(*version).unwrap();
            assert_eq!(json, json!({ "cniVersion": version.as_str() }));
        }
    }

    #[test]
    fn a_result_without_version_has_the_given_one() {
        let old = json!({ "ip4": { "ip": "10.0.0.2/8", "routes": [{ "dst": "0.0.0.0/0" }] },
                          "ips": "not a key of this version" });
        let result = CniResult::from_json(&old, "result", SpecVersion::V0_2_0).unwrap();
        assert_eq!(result.ips[0].address.to_string(), "10.0.0.2/8");
        assert_eq!(result.routes.len(), 1);
        let new = json!({ "cniVersion": "", "ips": [{ "Address": "10.0.0.2/8", "gateway": "" }] });
        let result = CniResult::from_json(&new, "result", SpecVersion::V1_0_0).unwrap();
        assert_eq!(result.ips, [IpConfig::new("10.0.0.2/8".parse().unwrap())]);
    }

    #[test]
    fn invalid_results_name_the_place() {
        for (value, place) in [
            (json!([]), "prevResult is []"),
            (json!({ "cniVersion": "7" }), "\"7\""),
            (json!({ "ips": {} }), "prevResult.ips"),
            (
                json!({ "ips": [{}] }),
                "prevResult.ips[0].address is missing",
            ),
            (
                json!({ "ips": [{ "address": "10.0.0.1" }] }),
                "prevResult.ips[0].address",
            ),
            (
                json!({ "ips": [{ "address": "10.0.0.1/8", "interface": -1 }] }),
                "prevResult.ips[0].interface",
            ),
            (
                json!({ "routes": [{ "dst": "::/0", "scope": 256 }] }),
                "prevResult.routes[0].scope",
            ),
            (
                json!({ "interfaces": [{ "name": 5 }] }),
                "prevResult.interfaces[0].name",
            ),
            (
                json!({ "dns": { "search": ["a", 1] } }),
                "prevResult.dns.search[1]",
            ),
        ] {
            let error =
                CniResult::from_json(&value, "prevResult", SpecVersion::LATEST).unwrap_err();
            assert!(error.msg.contains(place), "{error}");
        }
    }

    fn net() -> impl Strategy<Value = IpNet> {
        (any::<IpAddr>(), 0..=128_u8).prop_map(|(ip, prefix)| {
            let prefix = if ip.is_ipv4() { prefix % 33 } else { prefix };
            IpNet::new(ip, prefix).unwrap()
        })
    }

    fn name() -> impl Strategy<Value = Option<String>> {
        prop::option::of("[a-z0-9/:]{1,8}")
    }

    prop_compose! {
        fn interface()(
            name in "[a-z]{1,8}", mac in name(), mtu in prop::option::of(1..=u32::MAX),
            sandbox in name(), socket_path in name(), pci_id in name(),
        ) -> Interface {
            Interface { name, mac, mtu, sandbox, socket_path, pci_id, extra: Map::new() }
        }
    }

    prop_compose! {
        fn ip()(address in net(), gateway: Option<IpAddr>, interface in prop::option::of(0..9_usize)) -> IpConfig {
            IpConfig { gateway, interface, ..IpConfig::new(address) }
        }
    }

    prop_compose! {
        fn route()(
            dst in net(), gw: Option<IpAddr>, mtu in prop::option::of(1..=u32::MAX),
            advmss in prop::option::of(1..=u32::MAX), priority in prop::option::of(1..=u32::MAX),
            table: Option<u32>, scope: Option<u8>,
        ) -> Route {
            Route { mtu, advmss, priority, table, scope, ..Route::new(dst, gw) }
        }
    }

    prop_compose! {
        fn result()(
            interfaces in prop::collection::vec(interface(), 0..3),
            ips in prop::collection::vec(ip(), 0..4),
            routes in prop::collection::vec(route(), 0..4),
            nameservers in prop::collection::vec("[a-z.]{1,5}", 0..3),
            domain in name(),
        ) -> CniResult {
            let dns = Dns { nameservers, domain, ..Dns::default() };
            CniResult { interfaces, ips, routes, dns, extra: Map::new() }
        }
    }

    /// What is left of a result once `version` has carried it.
    fn carried(mut result: CniResult, version: SpecVersion) -> CniResult {
        if version < SpecVersion::V1_0_0 {
            for interface in &mut result.interfaces {
                interface.mtu = None;
                interface.socket_path = None;
                interface.pci_id = None;
            }
        }
        if version < SpecVersion::V0_3_0 {
            result.interfaces.clear();
            let first = |v4| {
                result
                    .ips
                    .iter()
                    .find(|ip| ip.address.addr().is_ipv4() == v4)
                    .cloned()
            };
            let ips: Vec<_> = [first(true), first(false)].into_iter().flatten().collect();
            let mut routes = Vec::new();
            for ip in &ips {
                let v4 = ip.address.addr().is_ipv4();
                let of_family = result
                    .routes
                    .iter()
                    .filter(|r| r.dst.addr().is_ipv4() == v4);
                routes.extend(of_family.map(|route| Route::new(route.dst, route.gw)));
            }
            result.routes = routes;
            result.ips = ips
                .into_iter()
                .map(|ip| IpConfig {
                    interface: None,
                    ..ip
                })
                .collect();
        }
        result
    }

    proptest! {
        #[test]
        fn an_older_version_keeps_what_it_can_carry(result in result()) {
            for version in SpecVersion::SUPPORTED {
                if version < SpecVersion::V0_3_0 && result.ips.is_empty() {
                    prop_assert!(result.to_json(version).is_err());
                    continue;
                }
                let json = result.to_json(version).unwrap();
                let back = CniResult::from_json(&json, "result", SpecVersion::LATEST).unwrap();
                prop_assert_eq!(back, carried(result.clone(), version), "{}", version);
            }
        }
    }
}
