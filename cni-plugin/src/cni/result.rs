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
