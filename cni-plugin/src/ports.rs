//! Published ports: what an attachment claims, and where the node serves it.
//!
//! The datapath knows numbers ([`crate::datapath::publish`]); here they get the names
//! of those who want and have them, and the devices and addresses of the node.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use crate::{
    attachment::{Record, RecordError},
    cni::{CniError, HostIp, NetworkConfig, PortMapping, Protocol, result::IpConfig},
    datapath::{
        self, Datapath,
        nat::{NodePort, Publication, Service, XdpRun},
    },
    gateway::{self, Gateway},
    link::{Address, Link, Netlink, SockDiag},
    mac::MacAddr,
};

/// The kind of the devices that stand for a routing table (VRF): what is enslaved to
/// one is a device of the node's like any other.
const VRF: &str = "vrf";

/// The loopback device (`LOOPBACK_IFINDEX` of `net/flow.h`).
const LOOPBACK: u32 = 1;

/// How many look-ups are still cheaper than to list every socket that listens.
const LOOKUPS_MAX: usize = 100;

/// What a mapping claims for a pod with these addresses: one number in each family that
/// it is for, and the address that serves it.
fn claims(mapping: &PortMapping, ips: &[IpConfig]) -> impl Iterator<Item = (NodePort, IpAddr)> {
    let v4 = ips.iter().map(|ip| ip.address.addr()).find(IpAddr::is_ipv4);
    let v6 = ips.iter().map(|ip| ip.address.addr()).find(IpAddr::is_ipv6);
    let any_v4 = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let any_v6 = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let wanted = match mapping.host_ip {
        HostIp::Any => [Some((any_v4, v4)), Some((any_v6, v6))],
        HostIp::AnyV4 => [Some((any_v4, v4)), None],
        HostIp::AnyV6 => [None, Some((any_v6, v6))],
        HostIp::Address(address) if address.is_ipv4() => [Some((address, v4)), None],
        HostIp::Address(address) => [None, Some((address, v6))],
    };
    let (port, protocol) = (mapping.host_port, mapping.protocol.number());
    wanted
        .into_iter()
        .flatten()
        .filter_map(move |(address, pod)| {
            let port = NodePort {
                address,
                port,
                protocol,
            };
            Some((port, pod?))
        })
}

/// Every port that an attachment is to claim.
pub fn wanted(config: &NetworkConfig, ips: &[IpConfig]) -> Vec<NodePort> {
    config
        .port_mappings
        .iter()
        .flat_map(|mapping| claims(mapping, ips))
        .map(|(port, _)| port)
        .collect()
}

/// Whether XDP may redirect packets to this network's pods.
pub fn uses_xdp(config: &NetworkConfig) -> bool {
    !config.xdp_uplinks.is_empty() && !config.port_mappings.is_empty()
}

/// Publishes the ports of an attachment, which its record names already.
///
/// # Errors
///
/// A port is taken: the error names who has it. Or a device cannot be served.
pub fn publish(
    host: &Netlink,
    datapath: &Datapath,
    config: &NetworkConfig,
    record: &Record,
    gateway: &Gateway,
    ips: &[IpConfig],
) -> Result<(), CniError> {
    let Some(mut publication) = datapath.publication()? else {
        return Ok(());
    };
    let addresses = serve(host, &mut publication, config)?;
    let claimed = config
        .port_mappings
        .iter()
        .flat_map(|mapping| claims(mapping, ips).map(move |claim| (mapping, claim)))
        .try_for_each(|(mapping, (port, address))| {
            let own = ips.iter().find(|ip| ip.address.addr() == address);
            let service = Service {
                port: record.host_ifindex,
                segment: gateway.segment,
                address,
                pod_port: mapping.container_port,
                mac: MacAddr::new(record.mac),
                gateway: own.filter(|_| config.is_gateway).and_then(|ip| ip.gateway),
                gateway_mac: gateway.mac,
                xdp: uses_xdp(config),
            };
            claim(host, datapath, &mut publication, &port, &service)
        });
    if claimed.is_err() {
        // Before anybody else is refused for what this one does not get.
        for port in &record.published {
            publication.withdraw(port, record.host_ifindex)?;
        }
    }
    claimed?;
    // It is in nobody's way while it looks.
    drop(publication);
    warn_of_listeners(&record.published, &addresses);
    Ok(())
}

/// Tells the operator of the node's own processes that clients will not reach any more.
#[expect(
    clippy::print_stderr,
    reason = "stderr is where a plugin's warnings go; stdout is the answer"
)]
fn warn_of_listeners(ports: &[NodePort], node: &[IpAddr]) {
    let Ok(sockets) = SockDiag::host() else {
        return;
    };
    let list = |protocol| {
        (ports.len() * node.len() > LOOKUPS_MAX)
            .then(|| sockets.listening(protocol).unwrap_or_default())
    };
    let listening = [Protocol::Tcp, Protocol::Udp].map(|protocol| (protocol, list(protocol)));
    for port in ports {
        let of_protocol = |(protocol, _): &&(Protocol, _)| protocol.number() == port.protocol;
        let Some((protocol, listening)) = listening.iter().find(of_protocol) else {
            continue;
        };
        if listening
            .as_ref()
            .is_some_and(|listening| !listening.contains(&port.port))
        {
            continue;
        }
        // A socket of every address is found under any of them.
        let listener = node
            .iter()
            .filter(|&address| {
                port.address == *address
                    || port.address.is_unspecified() && port.address.is_ipv4() == address.is_ipv4()
            })
            .find_map(|&address| {
                let address = SocketAddr::new(address, port.port);
                sockets.listener(*protocol, address).ok().flatten()
            });
        if let Some(listener) = listener {
            eprintln!(
                "bpf-bridge: warning: {port} is published, but a process of user {} listens on {}: \
                 clients will reach the pod, not that process",
                listener.uid, listener.address
            );
        }
    }
}

/// Tells the operator that XDP costs more than it wins on a device.
#[expect(
    clippy::print_stderr,
    reason = "stderr is where a plugin's warnings go; stdout is the answer"
)]
fn warn_of_generic(device: &Link, because: Option<&str>) {
    let because = because.map_or(String::new(), |because| format!(" ({because})"));
    eprintln!(
        "bpf-bridge: warning: XDP runs on {} as generic XDP only, because its driver cannot run \
         it{because}: that is slower than to go without, take it out of \"xdpUplinks\"",
        device.name
    );
}

/// Claims one port, in place of an owner whose device is gone.
fn claim(
    host: &Netlink,
    datapath: &Datapath,
    publication: &mut Publication<'_>,
    port: &NodePort,
    service: &Service,
) -> Result<(), CniError> {
    loop {
        let Err(error) = publication.claim(port, service) else {
            return Ok(());
        };
        let datapath::Error::Taken { taken, owner, .. } = &error else {
            return Err(error.into());
        };
        match host.link_by_index(*owner)? {
            Some(link) if datapath.port(*owner)?.is_some() => {
                return Err(CniError::internal(format!(
                    "publishing {port}: {taken} is published by {}",
                    owner_name(&link)
                )));
            }
            // Its sandbox went without a DEL.
            _ => {
                publication.withdraw(taken, *owner)?;
            }
        }
    }
}

/// The attachment that a host veth belongs to, for people.
fn owner_name(link: &Link) -> String {
    let mut words = link.alias.split(' ');
    match (words.next(), words.next(), words.next(), words.next()) {
        (Some("bpf-bridge"), Some(network), Some(container), Some(ifname)) => {
            format!("container {container} (interface {ifname} in network {network})")
        }
        _ => format!("the pod behind {}", link.name),
    }
}

/// Gives the ports of an attachment back.
///
/// # Errors
///
/// The tables cannot be used.
pub fn withdraw(datapath: &Datapath, record: &Record) -> Result<(), datapath::Error> {
    if record.published.is_empty() {
        return Ok(());
    }
    let Some(mut publication) = datapath.publication()? else {
        return Ok(());
    };
    let mut served = HashSet::new();
    for port in &record.published {
        let service = publication.withdraw(port, record.host_ifindex)?;
        if port.protocol == Protocol::Udp.number() {
            served.extend(service);
        }
    }
    // Sockets of the node that are connected to the pod would go on sending to an
    // address that may soon be another pod's.
    if let (false, Ok(sockets)) = (served.is_empty(), SockDiag::host()) {
        for remote in served {
            let _ = sockets.destroy_connected(remote);
        }
    }
    Ok(())
}

/// Follows the node: its addresses, for clients on it, and its devices, for others.
/// The devices are the matter of networks that publish, of which `publishes` says
/// whether this is one.
///
/// # Errors
///
/// The kernel does not tell them, or a device cannot be served.
pub fn follow_node(
    host: &Netlink,
    datapath: &Datapath,
    config: &NetworkConfig,
    publishes: impl FnOnce() -> Result<bool, RecordError>,
) -> Result<(), CniError> {
    let Some(mut publication) = datapath.publication()? else {
        return Ok(());
    };
    if publishes()? {
        serve(host, &mut publication, config)?;
    } else {
        publication.set_addresses(&numbers(&host.all_addresses()?))?;
    }
    Ok(())
}

fn numbers(addresses: &[Address]) -> Vec<IpAddr> {
    addresses.iter().map(|address| address.net.addr()).collect()
}

/// Returns the node's addresses.
fn serve(
    host: &Netlink,
    publication: &mut Publication<'_>,
    config: &NetworkConfig,
) -> Result<Vec<IpAddr>, CniError> {
    let (addresses, devices) = node(host, config)?;
    publication.set_addresses(&addresses)?;
    for device in devices {
        match publication.serve_on(host, &device) {
            // They come and go, and others' pods may have some.
            Err(_) if host.link_by_index(device.index)?.is_none() => {}
            served => served?,
        }
    }
    for device in named(host, "xdpUplinks", &config.xdp_uplinks)? {
        // What XDP leaves is for the other program.
        publication.serve_on(host, &device)?;
        if let XdpRun::Generic { because } = publication.serve_by_xdp_on(&device)? {
            warn_of_generic(&device, because.as_deref());
        }
    }
    Ok(addresses)
}

/// The node's addresses, and the devices on which others may reach it: those that carry
/// an address and are not ours, or those that the configuration names.
fn node(host: &Netlink, config: &NetworkConfig) -> Result<(Vec<IpAddr>, Vec<Link>), CniError> {
    let all = host.all_addresses()?;
    let links = host.links_with(&all)?;
    let devices = match &config.uplinks {
        Some(names) => named(host, "uplinks", names)?,
        None => {
            let mut devices = Vec::new();
            for link in links {
                if is_uplink(host, &link)? {
                    devices.push(link);
                }
            }
            devices
        }
    };
    Ok((numbers(&all), devices))
}

/// The devices that a list of the configuration names.
fn named(host: &Netlink, key: &'static str, names: &[String]) -> Result<Vec<Link>, CniError> {
    let mut devices = Vec::new();
    for name in names {
        let device = host.link_by_name(name)?.ok_or_else(|| {
            CniError::invalid_config(key, name, "the name of a device of the node")
        })?;
        devices.push(device);
    }
    Ok(devices)
}

fn is_uplink(host: &Netlink, link: &Link) -> Result<bool, CniError> {
    if link.index == LOOPBACK || gateway::is_gateway(link) {
        return Ok(false);
    }
    match link.master {
        // What a bridge or a bond gets from its ports, it receives itself.
        Some(master) => Ok(host
            .link_by_index(master)?
            .is_some_and(|master| master.kind == VRF)),
        None => Ok(true),
    }
}

/// What is wrong with an attachment's published ports, if anything is.
///
/// # Errors
///
/// The tables cannot be read.
pub fn check(datapath: &Datapath, record: &Record) -> Result<Option<String>, CniError> {
    if record.published.is_empty() {
        return Ok(None);
    }
    let Some(publication) = datapath.publication()? else {
        return Ok(Some(
            "the programs of published ports are not loaded".to_owned(),
        ));
    };
    for port in &record.published {
        if publication.owner(port)? != Some(record.host_ifindex) {
            return Ok(Some(format!("the published port {port} is lost")));
        }
    }
    Ok(None)
}
