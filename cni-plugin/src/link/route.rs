//! Routes over one device.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use ipnet::IpNet;
use netlink_packet_core::NLM_F_CREATE;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{
        RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
        RouteScope, RouteType,
    },
};

use super::{LinkError, Netlink, netlink::poll};

/// The routing table that is used where none is named (`main`).
pub const MAIN_TABLE: u32 = 254;

/// A unicast route over a device, with what the CNI's result can say of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Where to; bits behind the prefix do not count.
    pub dst: IpNet,
    /// Through which neighbour; `None` if the destination is on the link.
    pub gw: Option<IpAddr>,
    /// Metric, lower is preferred; 0 leaves it to the kernel, which means 0 for
    /// IPv4 and 1024 for IPv6.
    pub priority: u32,
    /// Routing table; `None` is [`MAIN_TABLE`].
    pub table: Option<u32>,
    /// Scope as the kernel numbers it (`RT_SCOPE_*`: 0 universe, 253 link, 254
    /// host); `None` is universe with a gateway and link without one. IPv6 has
    /// no scopes: the kernel takes any, keeps none.
    pub scope: Option<u8>,
    /// Path MTU in bytes; 0 leaves it to the device.
    pub mtu: u32,
    /// Largest TCP segment to advertise, in bytes; 0 leaves it to the MTU.
    pub advmss: u32,
}

impl Route {
    /// A route in the main table, everything else the kernel's default.
    #[must_use]
    pub const fn new(dst: IpNet, gw: Option<IpAddr>) -> Self {
        Self {
            dst,
            gw,
            priority: 0,
            table: None,
            scope: None,
            mtu: 0,
            advmss: 0,
        }
    }

    fn to_message(self, index: u32) -> RouteMessage {
        let dst = self.dst.trunc();
        let mut message = RouteMessage::default();
        let header = &mut message.header;
        header.address_family = family(&dst);
        header.destination_prefix_length = dst.prefix_len();
        header.protocol = RouteProtocol::Boot;
        header.kind = RouteType::Unicast;
        header.scope = match (self.scope, self.gw) {
            (Some(scope), _) => RouteScope::from(scope),
            (None, Some(_)) => RouteScope::Universe,
            (None, None) => RouteScope::Link,
        };
        let table = self.table.unwrap_or(MAIN_TABLE);
        let attributes = &mut message.attributes;
        match u8::try_from(table) {
            Ok(table) => header.table = table,
            Err(_) => {
                header.table = RouteHeader::RT_TABLE_UNSPEC;
                attributes.push(RouteAttribute::Table(table));
            }
        }
        attributes.push(RouteAttribute::Oif(index));
        // Without RTA_DST the prefix length of 0 is a default route.
        if dst.prefix_len() != 0 {
            attributes.push(RouteAttribute::Destination(dst.addr().into()));
        }
        if let Some(gw) = self.gw {
            attributes.push(RouteAttribute::Gateway(gw.into()));
        }
        if self.priority != 0 {
            attributes.push(RouteAttribute::Priority(self.priority));
        }
        let metrics: Vec<_> = [
            (self.mtu != 0).then_some(RouteMetric::Mtu(self.mtu)),
            (self.advmss != 0).then_some(RouteMetric::Advmss(self.advmss)),
        ]
        .into_iter()
        .flatten()
        .collect();
        if !metrics.is_empty() {
            attributes.push(RouteAttribute::Metrics(metrics));
        }
        message
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "route to {}", self.dst)?;
        if let Some(gw) = self.gw {
            write!(f, " through {gw}")?;
        }
        if self.priority != 0 {
            write!(f, " metric {}", self.priority)?;
        }
        if let Some(table) = self.table {
            write!(f, " in table {table}")?;
        }
        if let Some(scope) = self.scope {
            write!(f, " of scope {scope}")?;
        }
        Ok(())
    }
}

fn family(net: &IpNet) -> AddressFamily {
    match net {
        IpNet::V4(_) => AddressFamily::Inet,
        IpNet::V6(_) => AddressFamily::Inet6,
    }
}

impl Netlink {
    /// Adds a route over the device `index`, beside any other to the same
    /// destination, as the stock plugins do: a new IPv4 route of the same metric
    /// goes before the old one, an IPv6 one becomes another path of it. `false`
    /// if this very route is there already.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`], with `ENETUNREACH` or `EHOSTUNREACH` if the
    /// gateway is not on the link.
    pub fn add_route(&self, index: u32, route: &Route) -> Result<bool, LinkError> {
        match self.request(
            RouteNetlinkMessage::NewRoute(route.to_message(index)),
            NLM_F_CREATE,
            || format!("add {route} over {}", self.interface(index)),
        ) {
            Ok(_) => Ok(true),
            Err(error) if error.errno() == Some(nix::libc::EEXIST) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Deletes a route over the device `index`. `false` if there is none.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub fn delete_route(&self, index: u32, route: &Route) -> Result<bool, LinkError> {
        match self.request(
            RouteNetlinkMessage::DelRoute(route.to_message(index)),
            0,
            || format!("delete {route} over {}", self.interface(index)),
        ) {
            Ok(_) => Ok(true),
            Err(error) if error.is_missing() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The unicast routes of one table and family whose one path goes over the
    /// device `index`. One dump, filtered by the kernel; made for a sandbox,
    /// where it is a handful.
    ///
    /// A route of several paths is given once for each path over the device.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub fn routes(&self, index: u32, ipv6: bool, table: u32) -> Result<Vec<Route>, LinkError> {
        let mut query = RouteMessage::default();
        query.header.address_family = if ipv6 {
            AddressFamily::Inet6
        } else {
            AddressFamily::Inet
        };
        query.header.kind = RouteType::Unicast;
        query.attributes = vec![RouteAttribute::Table(table), RouteAttribute::Oif(index)];
        let found = match self.dump(&RouteNetlinkMessage::GetRoute(query), || {
            format!(
                "list the routes over {} in table {table}",
                self.interface(index)
            )
        }) {
            Ok(found) => found,
            // The kernel has no such table, or the device is gone.
            Err(error) if error.errno() == Some(nix::libc::ENOENT) || error.is_missing() => {
                Vec::new()
            }
            Err(error) => return Err(error),
        };
        Ok(found
            .iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewRoute(message) => Some(describe(index, message)),
                _ => None,
            })
            .flatten()
            .filter(|route| route.table == Some(table))
            .collect())
    }

    /// Waits until the namespace takes what is sent to `address` for its own, at
    /// most `limit`; returns whether it does.
    ///
    /// An IPv6 address that the kernel has acknowledged is not yet one: its local
    /// route is made by a work queue (`addrconf_dad_work`), without duplicate
    /// address detection too. On a busy machine packets came before it.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub fn wait_local(&self, address: IpAddr, limit: Duration) -> Result<bool, LinkError> {
        poll(limit, || self.is_local(address))
    }

    fn is_local(&self, address: IpAddr) -> Result<bool, LinkError> {
        let dst = IpNet::from(address);
        let mut query = RouteMessage::default();
        query.header.address_family = family(&dst);
        query.header.destination_prefix_length = dst.prefix_len();
        query
            .attributes
            .push(RouteAttribute::Destination(address.into()));
        let found = self.request(RouteNetlinkMessage::GetRoute(query), 0, || {
            format!("look up the route to {address}")
        });
        match found {
            Ok(found) => Ok(found.iter().any(|message| {
                matches!(message, RouteNetlinkMessage::NewRoute(route)
                    if route.header.kind == RouteType::Local)
            })),
            Err(error) if error.errno() == Some(nix::libc::ENETUNREACH) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether `route` is there, over the device `index`: same destination,
    /// gateway and table, and the same metric, scope, MTU and advertised segment
    /// as far as `route` says any.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub fn has_route(&self, index: u32, route: &Route) -> Result<bool, LinkError> {
        let ipv6 = matches!(route.dst, IpNet::V6(_));
        let dst = route.dst.trunc();
        let table = route.table.unwrap_or(MAIN_TABLE);
        Ok(self.routes(index, ipv6, table)?.iter().any(|found| {
            let says = |want: u32, is: u32| want == 0 || want == is;
            found.dst == dst
                && found.gw == route.gw
                && says(route.priority, found.priority)
                && (ipv6 || route.scope.is_none() || route.scope == found.scope)
                && says(route.mtu, found.mtu)
                && says(route.advmss, found.advmss)
        }))
    }
}

/// The paths of one route that go over the device `index`.
fn describe(index: u32, message: &RouteMessage) -> Vec<Route> {
    let header = &message.header;
    let any = match header.address_family {
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    };
    let mut dst = any;
    let mut route = Route::new(IpNet::from(any), None);
    route.table = Some(header.table.into());
    route.scope = Some(header.scope.into());
    let mut over = Vec::new();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => dst = to_ip(address).unwrap_or(any),
            RouteAttribute::Gateway(address) => route.gw = to_ip(address),
            RouteAttribute::Oif(found) => over.push((*found, None)),
            RouteAttribute::Priority(priority) => route.priority = *priority,
            RouteAttribute::Table(table) => route.table = Some(*table),
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    match metric {
                        RouteMetric::Mtu(mtu) => route.mtu = *mtu,
                        RouteMetric::Advmss(advmss) => route.advmss = *advmss,
                        _ => {}
                    }
                }
            }
            RouteAttribute::MultiPath(paths) => {
                for path in paths {
                    let gw = path
                        .attributes
                        .iter()
                        .find_map(|attribute| match attribute {
                            RouteAttribute::Gateway(address) => to_ip(address),
                            _ => None,
                        });
                    over.push((path.interface_index, Some(gw)));
                }
            }
            _ => {}
        }
    }
    let Ok(dst) = IpNet::new(dst, header.destination_prefix_length) else {
        return Vec::new();
    };
    route.dst = dst;
    over.into_iter()
        .filter(|(found, _)| *found == index)
        .map(|(_, gw)| Route {
            gw: gw.unwrap_or(route.gw),
            ..route
        })
        .collect()
}

fn to_ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::link::testing::Pair;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    /// A pair whose sandbox has an address of each family.
    fn addressed() -> Pair {
        let pair = Pair::new();
        pair.up();
        for address in ["10.1.0.5/16", "fd00::5/64"] {
            pair.inside
                .add_address(pair.made.peer, net(address), false)
                .unwrap();
        }
        pair
    }

    fn default(gw: &str) -> Route {
        let gw: IpAddr = gw.parse().unwrap();
        let any = if gw.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
        Route::new(net(any), Some(gw))
    }

    #[test]
    fn default_routes_are_added_once() {
        let pair = addressed();
        for gw in ["10.1.0.1", "fd00::1"] {
            let route = default(gw);
            assert!(!pair.inside.has_route(pair.made.peer, &route).unwrap());
            assert!(pair.inside.add_route(pair.made.peer, &route).unwrap());
            assert!(!pair.inside.add_route(pair.made.peer, &route).unwrap());
            assert!(pair.inside.has_route(pair.made.peer, &route).unwrap());
        }
        let table = |file: &str| {
            pair.sandbox
                .run_in(|| fs::read_to_string(format!("/proc/thread-self/net/{file}")))
                .unwrap()
                .unwrap()
        };
        // Interface, destination, gateway (network order read as an integer).
        let four = table("route");
        assert!(four.contains("eth0\t00000000\t0100010A\t"), "{four}");
        let six = table("ipv6_route");
        let gateway = "00000000000000000000000000000000 00 00000000000000000000000000000000 00 \
                       fd000000000000000000000000000001";
        assert!(six.contains(gateway), "{six}");
    }

    #[test]
    fn everything_said_of_a_route_arrives() {
        let pair = addressed();
        let peer = pair.made.peer;
        for (dst, gw) in [("192.0.2.0/24", "10.1.0.1"), ("2001:db8::/32", "fd00::1")] {
            let route = Route {
                dst: net(dst),
                gw: Some(gw.parse().unwrap()),
                priority: 77,
                table: Some(4242),
                scope: Some(0),
                mtu: 1400,
                advmss: 1300,
            };
            assert!(pair.inside.add_route(peer, &route).unwrap());
            let ipv6 = route.gw.unwrap().is_ipv6();
            assert_eq!(pair.inside.routes(peer, ipv6, 4242).unwrap(), [route]);
            assert!(pair.inside.has_route(peer, &route).unwrap());
            // Each part counts, and another table is another table.
            for other in [
                Route {
                    table: None,
                    ..route
                },
                Route {
                    table: Some(4243),
                    ..route
                },
                Route {
                    priority: 78,
                    ..route
                },
                Route { mtu: 1401, ..route },
                Route {
                    advmss: 1301,
                    ..route
                },
                Route { gw: None, ..route },
                Route {
                    dst: net("198.51.100.0/24"),
                    ..route
                },
            ] {
                assert!(!pair.inside.has_route(peer, &other).unwrap(), "{other}");
            }
            assert!(pair.inside.delete_route(peer, &route).unwrap());
            assert!(!pair.inside.delete_route(peer, &route).unwrap());
            assert!(!pair.inside.has_route(peer, &route).unwrap());
        }
    }

    #[test]
    fn routes_to_the_link_and_host_bits_are_taken() {
        let pair = addressed();
        let peer = pair.made.peer;
        for dst in ["192.0.2.9/24", "2001:db8::9/64"] {
            let route = Route::new(net(dst), None);
            assert!(pair.inside.add_route(peer, &route).unwrap());
            assert!(pair.inside.has_route(peer, &route).unwrap());
        }
        let found = pair.inside.routes(peer, false, MAIN_TABLE).unwrap();
        let route = found.iter().find(|r| r.dst == net("192.0.2.0/24")).unwrap();
        assert_eq!((route.gw, route.scope), (None, Some(253)));
    }

    #[test]
    fn a_second_default_route_stands_beside_the_first() {
        let pair = addressed();
        let peer = pair.made.peer;
        for gw in ["10.1.0.1", "10.1.0.2", "fd00::1", "fd00::2"] {
            assert!(pair.inside.add_route(peer, &default(gw)).unwrap());
        }
        for gw in ["10.1.0.1", "10.1.0.2", "fd00::1", "fd00::2"] {
            assert!(pair.inside.has_route(peer, &default(gw)).unwrap(), "{gw}");
        }
        // The newer one of IPv4 is the one that is used.
        let first = pair.inside.routes(peer, false, MAIN_TABLE).unwrap()[0];
        assert_eq!(first.gw, default("10.1.0.2").gw);
    }

    #[test]
    fn a_gateway_off_the_link_is_refused_with_its_address() {
        let pair = addressed();
        for gw in ["192.0.2.1", "2001:db8::1"] {
            let error = pair
                .inside
                .add_route(pair.made.peer, &default(gw))
                .unwrap_err();
            assert!(error.to_string().contains(gw), "{error}");
            let unreachable = [nix::libc::ENETUNREACH, nix::libc::EHOSTUNREACH];
            assert!(unreachable.contains(&error.errno().unwrap()), "{error}");
        }
    }

    #[test]
    fn another_devices_routes_are_not_listed() {
        let pair = addressed();
        let loopback = pair.inside.link_by_name("lo").unwrap().unwrap().index;
        assert_eq!(pair.inside.routes(loopback, false, MAIN_TABLE).unwrap(), []);
        let connected = pair
            .inside
            .routes(pair.made.peer, false, MAIN_TABLE)
            .unwrap();
        assert!(
            connected
                .iter()
                .any(|route| route.dst == net("10.1.0.0/16"))
        );
        assert_eq!(pair.inside.routes(99_999, false, MAIN_TABLE).unwrap(), []);
    }
}
