//! Published ports: what an attachment claims.
//!
//! The datapath knows numbers ([`crate::datapath::nat`]); here they get the names
//! of those who want and have them.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use crate::{
    attachment::Record,
    cni::{CniError, HostIp, NetworkConfig, PortMapping, Protocol, result::IpConfig},
    datapath::{
        self, Datapath,
        nat::{Nat, NodePort, Service},
    },
    gateway::Gateway,
    link::{Link, Netlink, SockDiag},
    mac::MacAddr,
};

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
    nat: &mut Nat<'_>,
    config: &NetworkConfig,
    record: &Record,
    gateway: &Gateway,
    ips: &[IpConfig],
) -> Result<(), CniError> {
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
            claim(host, nat, &port, &service)
        });
    if claimed.is_err() {
        // Before anybody else is refused for what this one does not get.
        for port in &record.published {
            nat.withdraw(port, record.host_ifindex)?;
        }
    }
    claimed
}

/// Tells the operator of the node's own processes that clients will not reach any more.
#[expect(
    clippy::print_stderr,
    reason = "stderr is where a plugin's warnings go; stdout is the answer"
)]
pub fn warn_of_listeners(ports: &[NodePort], node: &[IpAddr]) {
    if ports.is_empty() {
        return;
    }
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

/// Claims one port, in place of an owner whose device is gone.
fn claim(
    host: &Netlink,
    nat: &mut Nat<'_>,
    port: &NodePort,
    service: &Service,
) -> Result<(), CniError> {
    loop {
        let Err(error) = nat.claim(port, service) else {
            return Ok(());
        };
        let datapath::Error::Taken { taken, owner, .. } = &error else {
            return Err(error.into());
        };
        match host.link_by_index(*owner)? {
            Some(link) if nat.datapath().port(*owner)?.is_some() => {
                return Err(CniError::internal(format!(
                    "publishing {port}: {taken} is published by {}",
                    owner_name(&link)
                )));
            }
            // Its sandbox went without a DEL.
            _ => {
                nat.withdraw(taken, *owner)?;
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
pub fn withdraw(nat: &mut Nat<'_>, record: &Record) -> Result<(), datapath::Error> {
    let mut served = HashSet::new();
    for port in &record.published {
        let service = nat.withdraw(port, record.host_ifindex)?;
        if port.protocol == Protocol::Udp.number() {
            served.extend(service);
        }
    }
    // Sockets of the node that are connected to the pod would go on sending to an
    // address that may soon be another pod's.
    if served.is_empty() {
        return Ok(());
    }
    if let Ok(sockets) = SockDiag::host() {
        for remote in served {
            let _ = sockets.destroy_connected(remote);
        }
    }
    Ok(())
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
    let Some(nat) = datapath.nat()? else {
        return Ok(Some(
            "the programs of published ports are not loaded".to_owned(),
        ));
    };
    for port in &record.published {
        if nat.owner(port)? != Some(record.host_ifindex) {
            return Ok(Some(format!("the published port {port} is lost")));
        }
    }
    Ok(None)
}
