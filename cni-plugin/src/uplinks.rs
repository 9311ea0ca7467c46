//! The node as others see it: its addresses, and the devices by which they reach it and
//! pods reach them.
//!
//! Nobody tells of changes, so every call that works on a network looks.

use std::net::IpAddr;

use crate::{
    attachment::{Outside, RecordError},
    cni::{CniError, NetworkConfig},
    datapath::{
        Datapath,
        nat::{Nat, XdpRun},
    },
    gateway,
    link::{Address, Link, Netlink},
};

/// The kind of the devices that stand for a routing table (VRF): what is enslaved to
/// one is a device of the node's like any other.
const VRF: &str = "vrf";

/// The loopback device (`LOOPBACK_IFINDEX` of `net/flow.h`).
const LOOPBACK: u32 = 1;

/// Follows the node: its addresses, and its devices. The devices are the matter of
/// networks that publish or are masqueraded, of which `outside` says whether this is one.
///
/// # Errors
///
/// The kernel does not tell them, or a device cannot be served.
pub fn follow(
    host: &Netlink,
    datapath: &Datapath,
    config: &NetworkConfig,
    outside: impl FnOnce() -> Result<Outside, RecordError>,
) -> Result<(), CniError> {
    let Some(mut nat) = datapath.nat()?.filter(Nat::has_uplinks) else {
        return Ok(());
    };
    let outside = outside()?;
    if outside.is_needed() {
        serve(host, &mut nat, config, outside)?;
    } else {
        note_addresses(&mut nat, &host.all_addresses()?)?;
    }
    Ok(())
}

/// Serves the node's uplinks, and returns its addresses.
///
/// # Errors
///
/// The kernel does not tell them, or a device cannot be served.
pub fn serve(
    host: &Netlink,
    nat: &mut Nat<'_>,
    config: &NetworkConfig,
    outside: Outside,
) -> Result<Vec<IpAddr>, CniError> {
    let all = host.all_addresses()?;
    for device in devices(host, config, &all)? {
        match nat.serve_on(host, &device) {
            // They come and go, and others' pods may have some.
            Err(_) if host.link_by_index(device.index)?.is_none() => {}
            served => served?,
        }
    }
    if outside.publishes {
        for device in named(host, "xdpUplinks", &config.xdp_uplinks)? {
            // What XDP leaves is for the other program.
            nat.serve_on(host, &device)?;
            if let XdpRun::Generic { because } = nat.serve_by_xdp_on(&device)? {
                warn_of_generic(&device, because.as_deref());
            }
        }
    }
    note_addresses(nat, &all)
}

/// Tells the programs the node's addresses, and those of its uplinks.
fn note_addresses(nat: &mut Nat<'_>, all: &[Address]) -> Result<Vec<IpAddr>, CniError> {
    let addresses: Vec<IpAddr> = all.iter().map(|address| address.net.addr()).collect();
    nat.set_addresses(&addresses)?;
    nat.set_uplinks(all)?;
    Ok(addresses)
}

/// What is wrong with the devices that are served, if anything is.
///
/// # Errors
///
/// The kernel does not tell.
pub fn check(host: &Netlink, datapath: &Datapath) -> Result<Option<String>, CniError> {
    let Some(nat) = datapath.nat()? else {
        return Ok(None);
    };
    for index in nat.uplinks()? {
        if let Some(device) = host.link_by_index(index)?
            && !nat.is_served_on(host, &device)?
        {
            return Ok(Some(format!(
                "the programs on the uplink {} were detached",
                device.name
            )));
        }
    }
    Ok(None)
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

/// The devices on which others may reach the node: those that carry an address and are
/// not ours, or those that the configuration names.
fn devices(host: &Netlink, config: &NetworkConfig, all: &[Address]) -> Result<Vec<Link>, CniError> {
    if let Some(names) = &config.uplinks {
        return named(host, "uplinks", names);
    }
    let all: Vec<Address> = all
        .iter()
        .filter(|address| address.ifindex != LOOPBACK)
        .copied()
        .collect();
    let mut devices = Vec::new();
    for link in host.links_with(&all)? {
        if is_uplink(host, &link)? {
            devices.push(link);
        }
    }
    Ok(devices)
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
    if gateway::is_gateway(link) {
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
