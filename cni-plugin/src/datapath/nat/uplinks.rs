//! The devices by which packets leave and enter the node, and its addresses there.
//!
//! Each gets two programs: one sees what the device receives, the other what it sends.
//! They are attached by links that are pinned (tcx), or before Linux 6.6 as filters of
//! clsact, of which a pin tells where they are.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    os::fd::AsFd as _,
    path::PathBuf,
};

use aya::programs::{LinkOrder, SchedClassifier, TcAttachType, links::FdLink, tc::TcAttachOptions};
use bpf_bridge_common::layout::{Address, Uplink};

use super::{
    super::{
        ANY, Error, FILTER_HANDLE, FILTER_PRIORITY, entries, object, pins, remove, set, table,
    },
    Nat, id, loader, octets, open_classifier, pin_link, pin_program, xdp,
};
use crate::{
    fault,
    link::{self, Hook, Link, Netlink},
};

/// The programs of devices with Ethernet headers.
const fn program(hook: Hook) -> &'static str {
    match hook {
        Hook::Ingress => "uplink",
        Hook::Egress => "egress",
    }
}

/// Those of tunnels, which have none. Few nodes have any: they are loaded with the
/// first.
const fn tunnel_program(hook: Hook) -> &'static str {
    match hook {
        Hook::Ingress => "uplink_l3",
        Hook::Egress => "egress_l3",
    }
}

/// What the names of links begin with; the ifindex follows.
const fn link_kind(hook: Hook) -> &'static str {
    match hook {
        Hook::Ingress => "uplink-",
        Hook::Egress => "egress-",
    }
}

/// And those of the pins of filters.
const fn filter_kind(hook: Hook) -> &'static str {
    match hook {
        Hook::Ingress => "filter-uplink-",
        Hook::Egress => "filter-egress-",
    }
}

fn program_for(hook: Hook, device: &Link) -> &'static str {
    if device.ethernet {
        program(hook)
    } else {
        tunnel_program(hook)
    }
}

fn link_pin(hook: Hook, device: u32) -> PathBuf {
    pins::link(&format!("{}{device}", link_kind(hook)))
}

fn filter_pin(hook: Hook, device: u32) -> PathBuf {
    pins::link(&format!("{}{device}", filter_kind(hook)))
}

impl Nat<'_> {
    /// Lets local clients use these addresses of the node, and no others.
    ///
    /// # Errors
    ///
    /// The table cannot be read or written.
    pub fn set_addresses(&mut self, addresses: &[IpAddr]) -> Result<(), Error> {
        let wanted: HashSet<Address> = addresses.iter().copied().map(octets).collect();
        let present: HashSet<Address> = entries(&self.addresses, "ADDRESSES")?
            .into_iter()
            .map(|(address, _)| address)
            .collect();
        for &address in present.difference(&wanted) {
            remove(&mut self.addresses, "ADDRESSES", address)?;
        }
        for &address in wanted.difference(&present) {
            set(&mut self.addresses, "ADDRESSES", address, 1, ANY)?;
        }
        Ok(())
    }

    /// Notes as whom pods appear outside of each device that is served, as far as the
    /// kernel need not or cannot be asked; `all` are the node's addresses. Devices that
    /// are gone are forgotten.
    ///
    /// # Errors
    ///
    /// The table cannot be read or written.
    pub fn set_uplinks(&mut self, all: &[link::Address]) -> Result<(), Error> {
        let served: HashSet<u32> = [link_kind(Hook::Egress), filter_kind(Hook::Egress)]
            .into_iter()
            .flat_map(pins::devices)
            .collect();
        let present: HashMap<u32, Uplink> =
            entries(&self.uplinks, "UPLINKS")?.into_iter().collect();
        for &device in present.keys().filter(|device| !served.contains(device)) {
            remove(&mut self.uplinks, "UPLINKS", device)?;
        }
        for device in served {
            let uplink = uplink(device, all);
            if present.get(&device) != Some(&uplink) {
                set(&mut self.uplinks, "UPLINKS", device, uplink, ANY)?;
            }
        }
        Ok(())
    }

    /// Every device that is served.
    ///
    /// # Errors
    ///
    /// The table cannot be read.
    pub fn uplinks(&self) -> Result<Vec<u32>, Error> {
        let all = entries(&self.uplinks, "UPLINKS")?;
        Ok(all.into_iter().map(|(device, _)| device).collect())
    }

    /// Serves a device of the node: pods are reached and masqueraded there. Nothing is
    /// done if it is served already.
    ///
    /// # Errors
    ///
    /// A program cannot be attached or its link not be pinned.
    pub fn serve_on(&mut self, host: &Netlink, device: &Link) -> Result<(), Error> {
        for hook in Hook::ALL {
            if !is_attached(host, device, hook)? {
                attach(host, device, hook)?;
            }
        }
        Ok(())
    }

    /// Whether a device of the node has its programs.
    ///
    /// # Errors
    ///
    /// The kernel does not tell.
    pub fn is_served_on(&self, host: &Netlink, device: &Link) -> Result<bool, Error> {
        for hook in Hook::ALL {
            if !is_attached(host, device, hook)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Forgets devices of which `exists` says that they are gone.
    pub(super) fn sweep_uplinks<E: From<Error>>(
        &mut self,
        mut exists: impl FnMut(u32) -> Result<bool, E>,
    ) -> Result<(), E> {
        for hook in Hook::ALL {
            for kind in [link_kind(hook), filter_kind(hook)] {
                for device in pins::devices(kind) {
                    if !exists(device)? {
                        let _ = pins::remove(&pins::link(&format!("{kind}{device}")));
                    }
                }
            }
        }
        for (device, _) in entries(&self.uplinks, "UPLINKS")? {
            if !exists(device)? {
                remove(&mut self.uplinks, "UPLINKS", device)?;
            }
        }
        for (device, _) in entries(&self.xdp_uplinks, "XDP_UPLINKS")? {
            if !exists(device)? {
                remove(&mut self.xdp_uplinks, "XDP_UPLINKS", device)?;
                let _ = pins::remove(&xdp::pin(device));
            }
        }
        Ok(())
    }
}

/// As whom pods appear outside of a device, as the kernel's own masquerade chooses: its
/// first address, else one of the loopback device's. In IPv6 a global one comes before
/// a unique local one.
fn uplink(device: u32, all: &[link::Address]) -> Uplink {
    let choose = |is_wanted: fn(&IpAddr) -> bool| {
        [device, LOOPBACK]
            .into_iter()
            .find_map(|ifindex| {
                all.iter()
                    .filter(|address| address.eligible && address.ifindex == ifindex)
                    .map(|address| address.net.addr())
                    .filter(|address| is_wanted(address) && !address.is_loopback())
                    .min_by_key(|address| match address {
                        IpAddr::V4(_) => false,
                        IpAddr::V6(address) => address.is_unique_local(),
                    })
            })
            .map(octets)
    };
    Uplink {
        v4: choose(IpAddr::is_ipv4).unwrap_or(Address::UNSPECIFIED_V4),
        v6: choose(IpAddr::is_ipv6).unwrap_or(Address::UNSPECIFIED),
    }
}

/// The loopback device (`LOOPBACK_IFINDEX` of `net/flow.h`).
const LOOPBACK: u32 = 1;

fn attach(host: &Netlink, device: &Link, hook: Hook) -> Result<(), Error> {
    let name = program_for(hook, device);
    if !pins::nat(name).exists() {
        let mut ebpf = loader()?.load(object::NAT)?;
        pin_program(name, object::load_program(&mut ebpf, name)?)?;
    }
    let mut program = open_classifier(name)?;
    // That of a link that somebody has detached.
    pins::remove(&link_pin(hook, device.index))?;
    let attached = program.attach_with_options(
        &device.name,
        tcx_hook(hook),
        TcAttachOptions::TcxOrder(LinkOrder::default()),
    );
    if let Ok(id) = attached {
        fault::point(format_args!("attach {name}"));
        let link = program
            .take_link(id)
            .map_err(|source| Error::program(name, source))?;
        return pin_link(FdLink::try_from(link), &link_pin(hook, device.index));
    }
    // No tcx before 6.6.
    let fd = program
        .fd()
        .map_err(|source| Error::program(name, source))?;
    // Unlike a link it does not go with its pin, which tells where to look.
    let path = filter_pin(hook, device.index);
    pins::remove(&path)?;
    let mut pinned = open_classifier(name)?;
    pins::pin(&path, |path| pinned.pin(path))?;
    // Others may have made one.
    let _ = host.add_clsact(device.index);
    host.add_bpf(
        device.index,
        hook,
        FILTER_PRIORITY,
        FILTER_HANDLE,
        fd.as_fd(),
        name,
    )?;
    Ok(())
}

const fn tcx_hook(hook: Hook) -> TcAttachType {
    match hook {
        Hook::Ingress => TcAttachType::Ingress,
        Hook::Egress => TcAttachType::Egress,
    }
}

/// Whether the device carries the program. A pin does not say so: the link may have
/// been detached from its device, which it outlives.
fn is_attached(host: &Netlink, device: &Link, hook: Hook) -> Result<bool, Error> {
    let pin = pins::nat(program_for(hook, device));
    if !pin.exists() {
        return Ok(false);
    }
    let own = id(&pin)?;
    if link_pin(hook, device.index).exists()
        && let Ok((_, carried)) = SchedClassifier::query_tcx(&device.name, tcx_hook(hook))
        && carried.iter().any(|program| program.id() == own)
    {
        return Ok(true);
    }
    Ok(filter(host, device.index, hook)? == Some(own))
}

/// The kernel's id of the program that is in the filter's place on a device.
fn filter(host: &Netlink, device: u32, hook: Hook) -> Result<Option<u32>, Error> {
    Ok(host.tc_bpf(device, hook, FILTER_PRIORITY, FILTER_HANDLE)?)
}

/// Detaches the programs from all devices, and forgets these.
pub(super) fn detach_all() -> Result<(), Error> {
    forget_all::<u32, Uplink>("UPLINKS")?;
    forget_all::<Address, u8>("ADDRESSES")?;
    for hook in Hook::ALL {
        for device in pins::devices(filter_kind(hook)) {
            let host = Netlink::host()?;
            let pin = filter_pin(hook, device);
            if filter(&host, device, hook)? == Some(id(&pin)?) {
                host.delete_bpf(device, hook, FILTER_PRIORITY, FILTER_HANDLE)?;
            }
            pins::remove(&pin)?;
        }
        for device in pins::devices(link_kind(hook)) {
            pins::remove(&link_pin(hook, device))?;
        }
        pins::remove(&pins::nat(tunnel_program(hook)))?;
    }
    Ok(())
}

fn forget_all<K: bytemuck::Pod + std::fmt::Debug, V: bytemuck::Pod>(
    name: &'static str,
) -> Result<(), Error> {
    if !pins::map(name).exists() {
        return Ok(());
    }
    let mut map = table::<K, V>(name)?;
    for (key, _) in entries(&map, name)? {
        remove(&mut map, name, key)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(ifindex: u32, net: &str, eligible: bool) -> link::Address {
        link::Address {
            ifindex,
            net: net.parse().unwrap(),
            tentative: false,
            duplicate: false,
            link_local: false,
            eligible,
        }
    }

    #[test]
    fn pods_appear_as_the_first_address_that_the_kernel_could_choose() {
        let all = [
            address(LOOPBACK, "127.0.0.1/8", true),
            address(LOOPBACK, "192.0.2.7/32", true),
            address(2, "fe80::1/64", false),
            address(2, "fd00::1/64", true),
            address(2, "2001:db8::1/64", true),
            address(2, "2001:db8::2/64", true),
            address(2, "198.51.100.1/24", false),
            address(2, "198.51.100.2/24", true),
            address(3, "fd00:1::1/64", true),
        ];
        let chosen = |device| {
            let Uplink { v4, v6 } = uplink(device, &all);
            (super::super::address(v4), super::super::address(v6))
        };
        let expect = |v4: &str, v6: &str| (v4.parse().unwrap(), v6.parse().unwrap());
        assert_eq!(chosen(2), expect("198.51.100.2", "2001:db8::1"));
        assert_eq!(chosen(3), expect("192.0.2.7", "fd00:1::1"));
        assert_eq!(chosen(4), expect("192.0.2.7", "::"));
    }
}
