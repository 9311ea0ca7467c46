//! What pods say of addresses, before anybody hears it: an address that was assigned is
//! at the port that it was assigned to, whatever a frame says, and the way out of a
//! network that has a gateway is the gateway.
//!
//! `port` hands over what could say such a thing, and goes on by itself with most frames.
//! The gateway port's are the node's own, and believed.

use aya_ebpf::{macros::classifier, programs::TcContext};
use bpf_bridge_common::{
    drops::DropReason,
    frame::{self, Destination, ETH_HLEN, ETH_P_ARP, ETH_P_IP, ETH_P_IPV6},
    guard::{self, Frame, Payload, Said},
    layout::{
        IpKey, Mac, MacKey, PORT_CLAIMED, PORT_GATEWAY, PORT_MACSPOOFCHK, PORT_TENTATIVE,
        PROGRAM_GUARD, SEGMENT_ROUTED,
    },
};

use crate::{
    maps::PROGRAMS,
    port, responder,
    shared::{ENDPOINTS, PORTS, SEGMENTS, ifindex, skb},
};

/// Hands the frame to [`guard()`]. Comes back only if that could not be called.
#[inline(always)]
pub(crate) fn start(ctx: &TcContext) -> Result<i32, DropReason> {
    // SAFETY: the program that is called takes the same context.
    unsafe { PROGRAMS.tail_call(ctx, PROGRAM_GUARD) };
    Err(DropReason::Helper)
}

/// The program that looks.
#[classifier]
pub(crate) fn guard(ctx: TcContext) -> i32 {
    let ifindex = ifindex(&ctx);
    port::conclude(&ctx, ifindex, look(&ctx, ifindex))
}

#[inline(always)]
fn look(ctx: &TcContext, ifindex: u32) -> Result<i32, DropReason> {
    // SAFETY: the plugin replaces entries of this map whole.
    let port = unsafe { PORTS.get(ifindex) }.ok_or(DropReason::NotAPort)?;
    let to: Mac = ctx.load(0).map_err(|_| DropReason::Truncated)?;
    if let Some((ethertype, l3)) = payload(ctx)? {
        let mut said = Ok(());
        if port.flags & PORT_GATEWAY == 0 {
            if port.flags & PORT_MACSPOOFCHK != 0 {
                check_source(ctx, ifindex, port.segment, ethertype, l3)?;
            }
            said = judge(
                ifindex,
                port.segment,
                to,
                guard::said(&Bytes(ctx), ethertype, l3),
            );
        }
        let may_ask = l3 == ETH_HLEN && matches!(ethertype, ETH_P_ARP | ETH_P_IPV6);
        if may_ask && frame::destination(&to) == Destination::Group {
            return responder::start(ctx, said.is_err());
        }
        said?;
    }
    port::forward(ctx, ifindex, port, to)
}

/// The packet that a receiver finds in the frame, if any.
#[inline(always)]
fn payload(ctx: &TcContext) -> Result<Option<(u16, usize)>, DropReason> {
    // SAFETY: the context is valid for as long as the program runs.
    let (present, tag) = unsafe { ((*skb(ctx)).vlan_present, (*skb(ctx)).vlan_tci) };
    if present != 0 && guard::is_vlan(tag as u16) {
        // Another network than ours.
        return Ok(None);
    }
    match guard::payload(&Bytes(ctx)) {
        Payload::Packet(ethertype, l3) => Ok(Some((ethertype, l3))),
        Payload::Nothing => Ok(None),
        Payload::Hidden => Err(DropReason::Claimed),
    }
}

/// Whether what a pod says may be heard.
#[inline(always)]
fn judge(ifindex: u32, segment: u32, to: Mac, said: Said) -> Result<(), DropReason> {
    let key = match said {
        Said::Nothing => return Ok(()),
        Said::Hidden => return Err(DropReason::Claimed),
        Said::Advertised(_) | Said::Redirected(_) if is_routed(segment) => {
            return Err(DropReason::Claimed);
        }
        Said::Redirected(_) if !is_for_a_pod(segment, to) => return Err(DropReason::Claimed),
        Said::V4(address) => IpKey::v4(segment, address),
        Said::V6(address) | Said::Advertised(address) | Said::Redirected(address) => {
            IpKey::v6(segment, address)
        }
    };
    match owner(&key) {
        Some(owner) if owner != ifindex => Err(DropReason::Claimed),
        Some(_) => Ok(()),
        None => {
            remember(segment);
            Ok(())
        }
    }
}

/// Somebody has an address that was not assigned, and others believe it: whoever is
/// assigned it will have to announce himself.
#[inline(always)]
fn remember(segment: u32) {
    // SAFETY: the plugin replaces entries of this map whole.
    let Some(segment) = (unsafe { SEGMENTS.get(segment) }) else {
        return;
    };
    if let Some(gateway) = PORTS.get_ptr_mut(segment.gateway_port) {
        // SAFETY: an entry that is removed meanwhile is memory of the map still, and no
        // program sets another bit of this one.
        unsafe { (*gateway).flags |= PORT_CLAIMED };
    }
}

/// `macspoofchk`: no IP address of another port is a source.
#[inline(always)]
fn check_source(
    ctx: &TcContext,
    ifindex: u32,
    segment: u32,
    ethertype: u16,
    l3: usize,
) -> Result<(), DropReason> {
    let key = match ethertype {
        ETH_P_IP => Bytes(ctx)
            .load(l3 + 12)
            .map(|source| IpKey::v4(segment, source)),
        ETH_P_IPV6 => Bytes(ctx)
            .load(l3 + 8)
            .map(|source| IpKey::v6(segment, source)),
        _ => None,
    };
    match key {
        Some(key) if owner(&key).is_some_and(|owner| owner != ifindex) => Err(DropReason::Spoofed),
        _ => Ok(()),
    }
}

/// The port that an address was assigned to, for good.
#[inline(always)]
fn owner(key: &IpKey) -> Option<u32> {
    if let Some(owner) = responder::assigned(key) {
        return (owner.flags & PORT_TENTATIVE == 0).then_some(owner.port);
    }
    let mac = guard::mac_of(key.address)?;
    // SAFETY: the plugin replaces entries of this map whole.
    unsafe { ENDPOINTS.get(MacKey::new(key.segment, mac)) }.map(|owner| owner.port)
}

/// Whether the node is the router.
#[inline(always)]
fn is_routed(segment: u32) -> bool {
    // SAFETY: the plugin replaces entries of this map whole.
    unsafe { SEGMENTS.get(segment) }.is_some_and(|segment| segment.flags & SEGMENT_ROUTED != 0)
}

/// Whether the node itself gets nothing of the frame.
#[inline(always)]
fn is_for_a_pod(segment: u32, to: Mac) -> bool {
    // SAFETY: the plugin replaces entries of this map whole.
    let owner = unsafe { ENDPOINTS.get(MacKey::new(segment, to)) };
    frame::destination(&to) == Destination::Unicast
        && owner.is_none_or(|owner| owner.flags & PORT_GATEWAY == 0)
}

/// The frame as the common parser reads it.
struct Bytes<'a>(&'a TcContext);

impl Frame for Bytes<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.0.load(at).ok()
    }
}
