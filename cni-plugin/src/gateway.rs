//! The gateway port: by which the host takes part in a segment.
//!
//! It is a veth pair in the host's namespace. One end carries the `bridge` name,
//! the gateway's addresses and so the connected routes, like the bridge device of
//! the stock plugin; the other end is a port like any pod's. What pods send to
//! the gateway is redirected to the ingress of the device, and what the host
//! sends into the network comes out of the port: one device, one place.
//!
//! Everything here is done under the lock of the bridge ([`lock`]).

use std::{net::IpAddr, path::Path, time::Duration};

use ipnet::IpNet;
use thiserror::Error;

use crate::{
    attachment::hash,
    datapath::{self, Datapath, FILTER_HANDLE, FILTER_PRIORITY, LogLevel, PortSpec},
    link::{
        Hook, Ipv4Conf, Link, LinkError, LinkSettings, Netlink, VethSpec,
        sysctl::{Family, Sysctl, SysctlError},
    },
    lock::{Lock, LockError, Mode},
    mac::MacAddr,
};

/// The alias of every gateway device and gateway port: whose they are.
const ALIAS: &str = "bpf-bridge gateway";
/// Where the locks are.
const LOCKS: &str = "/run/bpf-bridge/bridges";
/// How long the kernel may take to make a device's carrier and local routes, which
/// it does by work queues; mostly it takes microseconds.
const READY: Duration = Duration::from_secs(2);

/// What every port is set to. The host has no address on it, so the reverse path
/// filter would drop whatever another classifier hands to the host's stack here;
/// and what is not set, systemd sets.
pub const PORT_SETTINGS: &[(Ipv4Conf, u32)] = &[(Ipv4Conf::RpFilter, 0)];

/// Why the gateway could not be set up.
#[derive(Debug, Error)]
pub enum GatewayError {
    /// The device belongs to somebody else.
    #[error(
        "bridge {name:?}: a {kind} of that name exists, and is not of bpf-bridge's making: \
         another `bridge` name, or `ip link delete {name}` when nothing uses it, would be right"
    )]
    NotOurs {
        /// Its name.
        name: String,
        /// Its kind.
        kind: String,
    },
    /// The device is of a datapath whose pins were removed.
    #[error(
        "bridge {0:?} belongs to a datapath whose pins are gone: pods that are attached to it reach \
         the neighbours that they know, but no others, and no more can join; `ip link delete {0}` \
         when they are gone"
    )]
    Orphaned(String),
    /// The gateway has another address.
    #[error(
        "{bridge:?} already has an IP address different from {wanted}: {present}; \
         `forceAddress: true` replaces it"
    )]
    OtherAddress {
        /// The gateway device.
        bridge: String,
        /// The address it should have.
        wanted: IpNet,
        /// The one in the way.
        present: IpNet,
    },
    /// A device could not be set up.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A setting could not be made.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// The datapath refused.
    #[error(transparent)]
    Datapath(#[from] datapath::Error),
    /// The lock could not be taken.
    #[error(transparent)]
    Lock(#[from] LockError),
}

/// A segment's gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gateway {
    /// The ifindex of the device: the segment's number.
    pub segment: u32,
    /// The MAC address of the device.
    pub mac: MacAddr,
    /// Its MTU in bytes.
    pub mtu: u32,
}

/// Takes the lock under which a segment's ports and gateway may be changed.
///
/// # Errors
///
/// [`LockError`].
pub fn lock(bridge: &str) -> Result<Lock, LockError> {
    Lock::take(&Path::new(LOCKS).join(bridge), Mode::Exclusive)
}

/// Whether a device is a gateway of ours.
pub fn is_gateway(link: &Link) -> bool {
    link.alias == ALIAS
}

/// The MAC address of a bridge's gateway: always the same, so that a gateway that
/// is made anew is found by those who knew the old one. Host veths have it too.
pub fn mac(bridge: &str) -> MacAddr {
    MacAddr::from_hash(hash(["gateway", bridge]))
}

/// Finds the gateway of `bridge`, or makes it; says which.
///
/// # Errors
///
/// [`GatewayError`]; then nothing is left of a gateway that was to be made.
pub fn ensure(
    host: &Netlink,
    datapath: &mut Datapath,
    level: LogLevel,
    bridge: &str,
    mtu: u32,
) -> Result<(Gateway, bool), GatewayError> {
    if let Some(link) = host.link_by_name(bridge)? {
        if let Some(segment) = datapath.segment(link.index)?
            && (link.alias == ALIAS || segment.members > 1)
        {
            if !(link.up && link.running) {
                // As the stock plugin sets its bridge up in every ADD.
                host.set_up(segment.gateway_port)?;
                host.set_up(link.index)?;
                host.wait_running(link.index, READY)?;
            }
            let gateway = Gateway {
                segment: link.index,
                mac: link.mac.unwrap_or_else(|| mac(bridge)),
                mtu: link.mtu,
            };
            return Ok((gateway, false));
        }
        remove_leftover(host, datapath, bridge, &link)?;
    }
    let gateway = create(host, datapath, level, bridge, mtu);
    if gateway.is_err()
        && let Some(link) = host.link_by_name(bridge)?
        && let Some(port) = port_of(host, bridge, &link)?
    {
        unmake(host, datapath, &spec(bridge, link.index, port.index))?;
    }
    Ok((gateway?, true))
}

/// Tells whether [`ensure`] would find or could make the gateway.
pub fn check(
    host: &Netlink,
    datapath: Option<&Datapath>,
    bridge: &str,
) -> Result<(), GatewayError> {
    let Some(link) = host.link_by_name(bridge)? else {
        return Ok(());
    };
    let segment = match datapath {
        Some(datapath) => datapath.segment(link.index)?,
        None => None,
    };
    if segment.is_some_and(|segment| link.alias == ALIAS || segment.members > 1) {
        return Ok(());
    }
    require_leftover(host, bridge, &link).map(drop)
}

/// Removes what an ADD that was killed has left, and refuses to remove anything
/// else.
fn remove_leftover(
    host: &Netlink,
    datapath: &mut Datapath,
    bridge: &str,
    link: &Link,
) -> Result<(), GatewayError> {
    let port = require_leftover(host, bridge, link)?;
    unmake(host, datapath, &spec(bridge, link.index, port.index))
}

/// The gateway port, as the datapath knows it.
fn spec(bridge: &str, segment: u32, port: u32) -> PortSpec<'static> {
    PortSpec {
        ifindex: port,
        segment,
        flags: 0,
        mac: mac(bridge).octets(),
        addresses: &[],
        tentative: false,
    }
}

/// Removes a gateway without pods.
///
/// What goes last is what it is found by if this is killed: [`remove_leftover`] comes
/// upon the device of one that never became whole, [`forget_deleted`] upon the segment of
/// one without a device.
fn unmake(
    host: &Netlink,
    datapath: &mut Datapath,
    gateway: &PortSpec<'_>,
) -> Result<(), GatewayError> {
    let known = datapath.segment(gateway.segment)?.is_some();
    if known {
        host.delete(gateway.segment)?;
    }
    datapath.remove_segment(gateway)?;
    if !known {
        host.delete(gateway.segment)?;
    }
    Ok(())
}

/// The other end of a device that has the bridge's name, if it is a gateway port.
fn port_of(host: &Netlink, bridge: &str, link: &Link) -> Result<Option<Link>, LinkError> {
    let Some(index) = link.peer_index else {
        return Ok(None);
    };
    let peer = host.link_by_index(index)?;
    Ok(peer.filter(|peer| peer.name == port_name(bridge)))
}

/// The gateway port of what an ADD that was killed has left; an error if it is anything
/// else.
fn require_leftover(host: &Netlink, bridge: &str, link: &Link) -> Result<Link, GatewayError> {
    // A pair that was just born has no alias yet, but a peer of our name.
    let Some(peer) = port_of(host, bridge, link)? else {
        return Err(GatewayError::NotOurs {
            name: bridge.to_owned(),
            kind: link.kind.clone(),
        });
    };
    // A gateway that became whole is known to the datapath that it became so with.
    if link.alias == ALIAS
        && host
            .tc_bpf(peer.index, Hook::Ingress, FILTER_PRIORITY, FILTER_HANDLE)?
            .is_some()
    {
        return Err(GatewayError::Orphaned(bridge.to_owned()));
    }
    Ok(peer)
}

/// Removes what the datapath has of gateways that somebody deleted, as container
/// engines do when a network is removed.
pub fn forget_deleted(host: &Netlink) -> Result<(), GatewayError> {
    let all = match Datapath::open()? {
        Some(datapath) => datapath.has_all_gateways(|segment| {
            Ok::<_, GatewayError>(host.link_by_index(segment)?.is_some())
        })?,
        None => true,
    };
    if all { Ok(()) } else { sweep(host) }
}

/// Removes what the datapath has of devices that are gone, of whatever network.
pub fn sweep(host: &Netlink) -> Result<(), GatewayError> {
    if let Some(mut datapath) = Datapath::open_alone()? {
        datapath.sweep(|ifindex| Ok::<_, GatewayError>(host.link_by_index(ifindex)?.is_some()))?;
    }
    Ok(())
}

fn create(
    host: &Netlink,
    datapath: &mut Datapath,
    level: LogLevel,
    bridge: &str,
    mtu: u32,
) -> Result<Gateway, GatewayError> {
    let mac = mac(bridge);
    let port = port_name(bridge);
    let pair = host.create_veth(&VethSpec {
        name: bridge,
        mac: Some(mac),
        peer_name: &port,
        peer_mac: Some(mac),
        peer_netns: None,
        mtu,
    })?;
    // The host must not learn routes from a pod, nor wait before it speaks.
    for (key, value) in [("accept_ra", 0), ("accept_redirects", 0), ("accept_dad", 0)] {
        let _ = Sysctl::device(Family::Ipv6, bridge, key)?.set(value)?;
    }
    datapath.attach(level, host, pair.peer)?;
    datapath.create_segment(&spec(bridge, pair.host, pair.peer))?;
    host.configure(
        pair.peer,
        &LinkSettings {
            up: Some(true),
            alias: Some(ALIAS),
            no_link_local: true,
            ipv4: PORT_SETTINGS,
            ..LinkSettings::default()
        },
    )?;
    // The alias of the device says that the gateway is whole.
    host.configure(
        pair.host,
        &LinkSettings {
            up: Some(true),
            alias: Some(ALIAS),
            ipv4: &[(Ipv4Conf::AcceptRedirects, 0)],
            ..LinkSettings::default()
        },
    )?;
    host.wait_running(pair.peer, READY)?;
    Ok(Gateway {
        segment: pair.host,
        mac,
        mtu: host.link_by_index(pair.host)?.map_or(mtu, |link| link.mtu),
    })
}

/// Removes a gateway that no port ever joined.
///
/// # Errors
///
/// The device or its entries cannot be removed.
pub fn remove_unused(
    host: &Netlink,
    datapath: &mut Datapath,
    bridge: &str,
    gateway: &Gateway,
    addresses: &[IpAddr],
) -> Result<(), GatewayError> {
    match datapath.segment(gateway.segment)? {
        Some(segment) if segment.members > 1 => Ok(()),
        Some(segment) => {
            let spec = spec(bridge, gateway.segment, segment.gateway_port);
            unmake(host, datapath, &PortSpec { addresses, ..spec })
        }
        // Somebody has, but for the device perhaps.
        None => Ok(host.delete(gateway.segment).map(drop)?),
    }
}

/// Gives the gateway its addresses, as `ensureAddr` of the stock plugin does: IPv4
/// has one, IPv6 one in each subnet; another is in the way, unless `force` is set.
///
/// # Errors
///
/// [`GatewayError::OtherAddress`], or the kernel refuses a change.
pub fn ensure_addresses(
    host: &Netlink,
    datapath: &mut Datapath,
    gateway: &Gateway,
    bridge: &str,
    addresses: &[IpNet],
    force: bool,
) -> Result<(), GatewayError> {
    let segment = gateway.segment;
    let mut present: Vec<(IpNet, bool)> = host
        .addresses(segment)?
        .into_iter()
        .map(|address| (address.net, address.link_local))
        .collect();
    for &wanted in addresses {
        let stays =
            |&(other, link_local): &(IpNet, bool)| link_local || !is_in_the_way(other, wanted);
        for &(other, _) in present.iter().filter(|address| !stays(address)) {
            if !force {
                return Err(GatewayError::OtherAddress {
                    bridge: bridge.to_owned(),
                    wanted,
                    present: other,
                });
            }
            host.delete_address(segment, other)?;
            datapath.remove_gateway_address(segment, other.addr())?;
        }
        present.retain(stays);
        if !present.iter().any(|&(address, _)| address == wanted) {
            if wanted.addr().is_ipv6() {
                let _ = Sysctl::device(Family::Ipv6, bridge, "disable_ipv6")?.set(0)?;
            }
            host.add_address(segment, wanted, false)?;
            host.wait_local(wanted.addr(), READY)?;
            present.push((wanted, false));
        }
        datapath.add_gateway_address(segment, wanted.addr(), gateway.mac.octets())?;
    }
    Ok(())
}

/// Whether a device cannot have both addresses.
fn is_in_the_way(other: IpNet, wanted: IpNet) -> bool {
    match (other, wanted) {
        (IpNet::V4(other), IpNet::V4(wanted)) => other != wanted,
        (IpNet::V6(other), IpNet::V6(wanted)) => {
            other != wanted && (other.contains(&wanted.addr()) || wanted.contains(&other.addr()))
        }
        _ => false,
    }
}

/// Lets the host forward what pods send out and what is sent to them.
///
/// # Errors
///
/// [`SysctlError`].
pub fn enable_forwarding(addresses: &[IpNet]) -> Result<(), GatewayError> {
    if addresses.iter().any(|net| net.addr().is_ipv4()) {
        let _ = Sysctl::ipv4_forwarding().set(1)?;
    }
    if addresses.iter().any(|net| net.addr().is_ipv6()) {
        let _ = Sysctl::ipv6_forwarding().set(1)?;
    }
    Ok(())
}

/// The name of the gateway port: the other end of the gateway device.
pub fn port_name(bridge: &str) -> String {
    format!("port{:011x}", hash(["gateway", bridge]) >> 20)
}
