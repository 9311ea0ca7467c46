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

use aya::programs::{
    LinkOrder, SchedClassifier, TcAttachType,
    links::{FdLink, LinkType},
    tc::TcAttachOptions,
};
use bpf_bridge_common::layout::{Address, Present, Uplink};

use super::{
    super::{
        ANY, Error, FILTER_HANDLE, FILTER_PRIORITY, Wire, bpf, entries, failed, hooks,
        pins::{self, Root},
        remove, set, table,
    },
    Nat, Translators, id, octets, open_classifier, pin_link, xdp,
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
        let present: HashSet<Address> = self
            .addresses
            .keys()
            .map(|key| key.map(|Wire(address)| address))
            .collect::<Result<_, _>>()
            .map_err(|source| failed("listing", "ADDRESSES", &"", source))?;
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
        Translators::load(&[], &[name])?.install(None)?;
    }
    let mut program = open_classifier(name)?;
    // An upgrade that was killed has left the program of another build there.
    if hand_over(hook, device.index, None, &program)? {
        return Ok(());
    }
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
    if replace_filter(host, hook, device.index, None, &mut program)? {
        return Ok(());
    }
    // Unlike a link it does not go with its pin, which tells where to look.
    let mut pinned = open_classifier(name)?;
    pins::replace(&filter_pin(hook, device.index), |path| pinned.pin(path))?;
    let fd = program
        .fd()
        .map_err(|source| Error::program(name, source))?;
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

/// Gives the link of a device, of this layout or of `old`, the program. `false` if it has
/// none.
fn hand_over(
    hook: Hook,
    device: u32,
    old: Option<&Root>,
    program: &SchedClassifier,
) -> Result<bool, Error> {
    let fd = program
        .fd()
        .map_err(|source| Error::program(self::program(hook), source))?;
    hooks::hand_over(
        &format!("{}{device}", link_kind(hook)),
        old,
        LinkType::Tcx,
        &[self::program(hook), tunnel_program(hook)],
        fd.as_fd(),
    )
}

/// The same for a filter.
fn replace_filter(
    host: &Netlink,
    hook: Hook,
    device: u32,
    old: Option<&Root>,
    program: &mut SchedClassifier,
) -> Result<bool, Error> {
    let own = filter_pin(hook, device);
    let name = format!("{}{device}", filter_kind(hook));
    let known = own.exists() || old.is_some_and(|old| old.link(&name).exists());
    let Some(carried) = filter(host, device, hook)?.filter(|_| known) else {
        return Ok(false);
    };
    let ours = [self::program(hook), tunnel_program(hook)];
    let Some(is) = hooks::program_name(carried)?.filter(|is| ours.contains(&is.as_str())) else {
        return Ok(false);
    };
    let fd = program
        .fd()
        .and_then(|fd| Ok(fd.try_clone()?))
        .map_err(|source| Error::program(&is, source))?;
    pins::replace(&own, |path| program.pin(path))?;
    host.replace_bpf(
        device,
        hook,
        FILTER_PRIORITY,
        FILTER_HANDLE,
        fd.as_fd(),
        &is,
    )?;
    Ok(true)
}

/// Gives every device that is served the programs that are pinned, between two packets; `old`
/// has links of a former layout. Returns how many hooks there are.
pub(in super::super) fn hand_over_all(host: &Netlink, old: Option<&Root>) -> Result<usize, Error> {
    let mut done = 0;
    for hook in Hook::ALL {
        for device in hooks::devices(link_kind(hook), old) {
            let name = format!("{}{device}", link_kind(hook));
            if let Some(is) = hooks::linked_program(&name, old)?
                && hand_over(hook, device, old, &open_classifier(&is)?)?
            {
                done += 1;
            }
        }
        for device in hooks::devices(filter_kind(hook), old) {
            if let Some(carried) = filter(host, device, hook)?
                && let Some(is) = hooks::program_name(carried)?
                && pins::nat(&is).exists()
                && replace_filter(host, hook, device, old, &mut open_classifier(&is)?)?
            {
                done += 1;
            }
        }
    }
    Ok(done)
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
    let name = program_for(hook, device);
    let pin = pins::nat(name);
    if !pin.exists() {
        return Ok(false);
    }
    let own = id(&pin, name)?;
    if link_pin(hook, device.index).exists()
        && let Ok(carried) = bpf::tcx_programs(device.index, hook)
        && carried.contains(&own)
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
    forget_all::<Address, Present>("ADDRESSES")?;
    for hook in Hook::ALL {
        for device in pins::devices(filter_kind(hook)) {
            let host = Netlink::host()?;
            let pin = filter_pin(hook, device);
            let carried = filter(&host, device, hook)?;
            if carried.is_some() && carried == hooks::pinned_program(&pin)? {
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
