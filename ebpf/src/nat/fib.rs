//! Questions to the host's routing tables.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NO_NEIGH,
        BPF_FIB_LKUP_RET_NOT_FWDED, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LOOKUP_OUTPUT,
        BPF_FIB_LOOKUP_SKIP_NEIGH, BPF_FIB_LOOKUP_SRC, bpf_fib_lookup as Lookup, bpf_redir_neigh,
    },
    helpers::{bpf_fib_lookup, bpf_redirect_neigh},
    programs::TcContext,
};
use bpf_bridge_common::{layout::Address, packet::Tuple};

use crate::{maps::ADDRESSES, shared::skb};

/// `AF_INET` and `AF_INET6` of `linux/socket.h`.
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Where a packet of the node leaves it.
pub(crate) enum Way {
    /// Out of a device, to a neighbour.
    Out(i32),
    /// It is longer than the way allows.
    TooBig,
    /// There is none.
    None,
}

#[inline(always)]
fn zeroed() -> Lookup {
    // SAFETY: the structure is made of numbers.
    unsafe { core::mem::zeroed() }
}

#[inline(always)]
fn ask(ctx: *mut c_void, lookup: &mut Lookup) -> u32 {
    // SAFETY: the structure is of the length that is given with it.
    unsafe { bpf_fib_lookup(ctx, lookup, size_of::<Lookup>() as i32, 0) as u32 }
}

/// What would become of a packet from `source` to `destination`, if `via` (a device
/// that forwards) received it.
#[inline(never)]
fn fate(ctx: *mut c_void, via: u32, source: &Address, destination: &Address) -> u32 {
    let mut lookup = zeroed();
    lookup.ifindex = via;
    set_addresses(&mut lookup, source, destination);
    ask(ctx, &mut lookup)
}

/// The device by which packets to `destination` leave that `via` receives, 0 if there is
/// none.
#[inline(never)]
pub(crate) fn toward(ctx: &TcContext, via: u32, destination: &Address) -> u32 {
    let mut lookup = zeroed();
    lookup.ifindex = via;
    set_addresses(&mut lookup, &destination.unspecified_like(), destination);
    match ask(ctx.as_ptr(), &mut lookup) {
        BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH | BPF_FIB_LKUP_RET_FRAG_NEEDED => {
            lookup.ifindex
        }
        _ => 0,
    }
}

#[inline(always)]
fn set_addresses(lookup: &mut Lookup, source: &Address, destination: &Address) {
    let from = source.words();
    let to = destination.words();
    if destination.is_v4() {
        lookup.family = AF_INET;
        lookup.__bindgen_anon_3.ipv4_src = from[3];
        lookup.__bindgen_anon_4.ipv4_dst = to[3];
    } else {
        lookup.family = AF_INET6;
        lookup.__bindgen_anon_3.ipv6_src = from;
        lookup.__bindgen_anon_4.ipv6_dst = to;
    }
}

/// Whether `address` is the node's, right now. `via` is the gateway device of a
/// segment: it forwards.
///
/// The kernel says of an address that is the node's that it does not forward to it;
/// of one without a route it says the same. So where it says that, either the
/// plugin has seen the address on a device of the node, or there must be a default
/// route: then no address is without one. (Of link-local addresses it always says
/// that; they are the plugin's affair.)
///
/// `ctx` is that of a tc or an XDP program.
#[inline(never)]
pub(crate) fn is_local(ctx: *mut c_void, via: u32, source: &Address, address: &Address) -> bool {
    if address.is_loopback() || address.is_group() {
        return false;
    }
    if address.is_link_local() {
        // The kernel forwards neither to such an address nor from one, whosever it is.
        return ADDRESSES.get_ptr(address).is_some();
    }
    let source = if source.is_link_local() {
        &Address::UNSPECIFIED
    } else {
        source
    };
    match fate(ctx, via, source, address) {
        BPF_FIB_LKUP_RET_NOT_FWDED => {
            ADDRESSES.get_ptr(address).is_some()
                || fate(ctx, via, source, &elsewhere(address)) != BPF_FIB_LKUP_RET_NOT_FWDED
        }
        BPF_FIB_LKUP_RET_FWD_DISABLED => ADDRESSES.get_ptr(address).is_some(),
        _ => false,
    }
}

/// Whether the node's answers would reach `client`, and by way of the node: a pod answers
/// its own neighbours directly. Nobody outside can have the addresses of these, of the
/// node itself, or of no single station.
#[inline(never)]
pub(crate) fn leads_back(ctx: *mut c_void, via: u32, node: &Address, client: &Address) -> bool {
    if client.is_link_local() {
        return true;
    }
    if client.is_group() || client.is_unspecified() || client.is_loopback() {
        return false;
    }
    let mut lookup = zeroed();
    lookup.ifindex = via;
    set_addresses(&mut lookup, node, client);
    matches!(
        ask(ctx, &mut lookup),
        BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH | BPF_FIB_LKUP_RET_FRAG_NEEDED
    ) && lookup.ifindex != via
}

/// An address of the same family that no machine has: only a default route leads
/// there (RFC 5737, RFC 6666).
#[inline(always)]
fn elsewhere(address: &Address) -> Address {
    if address.is_v4() {
        Address::v4([192, 0, 2, 254])
    } else {
        Address::v6([0x01, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xfe])
    }
}

/// The packet's mark counts as well (`BPF_FIB_LOOKUP_MARK`, since 6.10).
const BPF_FIB_LOOKUP_MARK: u32 = 1 << 5;

/// How a pod's packet leaves the node.
#[derive(Clone, Copy)]
pub(crate) struct Exit {
    /// The device.
    pub(crate) device: u32,
    /// The node's address there.
    pub(crate) address: Address,
    /// The family of the next hop.
    family: u8,
    /// Whether the packet is longer than the way allows; then nothing else is known.
    pub(crate) too_big: bool,
    /// The next hop.
    next: [u32; 4],
}

impl Exit {
    /// Sends a packet there.
    #[inline(always)]
    pub(crate) fn go(&self) -> i32 {
        hand_to(self.device, self.family, self.next)
    }
}

/// What is known of a packet that leaves the node.
#[derive(Clone, Copy)]
pub(crate) struct Leaving {
    /// The gateway device of the pod's segment.
    pub(crate) via: u32,
    /// The device by which it leaves, 0 if that is not known.
    pub(crate) device: u32,
    /// As in [`Question`].
    pub(crate) length: u16,
    /// Its protocol.
    pub(crate) protocol: u8,
}

/// How a packet of a pod leaves the node, and as whom the node itself would send it (since
/// Linux 6.7); says whether it does.
#[inline(never)]
pub(crate) fn exit(ctx: &TcContext, tuple: &Tuple, leaving: &Leaving, exit: &mut Exit) -> bool {
    let Leaving {
        via,
        device,
        length,
        protocol,
    } = *leaving;
    // SAFETY: the context is valid for as long as the program runs.
    let mark = unsafe { (*skb(ctx)).mark };
    let asked = BPF_FIB_LOOKUP_SRC | BPF_FIB_LOOKUP_SKIP_NEIGH;
    for (from, flags) in [
        // As the stack asks when it forwards.
        (via, asked | BPF_FIB_LOOKUP_MARK),
        (via, asked),
        // Whatever led the packet there, this device has routes.
        (device, asked | BPF_FIB_LOOKUP_OUTPUT),
    ] {
        if from == 0 {
            continue;
        }
        let mut lookup = zeroed();
        lookup.ifindex = from;
        lookup.__bindgen_anon_1.tot_len = length;
        // They choose among several ways to one destination.
        lookup.l4_protocol = protocol;
        lookup.sport = tuple.source_port.to_be();
        lookup.dport = tuple.destination_port.to_be();
        set_addresses(&mut lookup, &tuple.source, &tuple.destination);
        if flags & BPF_FIB_LOOKUP_MARK != 0 {
            // In a union with what the answer has there.
            let [a, b, c, d] = mark.to_ne_bytes();
            lookup.smac = [a, b, c, d, 0, 0];
        }
        // SAFETY: the structure is of the length that is given with it.
        let answer = unsafe {
            let length = size_of::<Lookup>() as i32;
            bpf_fib_lookup(ctx.as_ptr(), &mut lookup, length, flags) as u32
        };
        let too_big = answer == BPF_FIB_LKUP_RET_FRAG_NEEDED && length != 0;
        if !matches!(
            answer,
            BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH | BPF_FIB_LKUP_RET_FRAG_NEEDED
        ) || device != 0 && lookup.ifindex != device
        {
            continue;
        }
        // SAFETY: the kernel has written both there; an IPv4 address is the first word.
        let (source, next) = unsafe {
            (
                lookup.__bindgen_anon_3.ipv6_src,
                lookup.__bindgen_anon_4.ipv6_dst,
            )
        };
        let address = if tuple.source.is_v4() {
            Address::v4(source[0].to_ne_bytes())
        } else {
            Address::from_words(source)
        };
        *exit = Exit {
            device: lookup.ifindex,
            address,
            family: lookup.family,
            too_big,
            next,
        };
        return true;
    }
    false
}

/// What is asked about a packet that is to leave the node, besides its addresses.
#[derive(Clone, Copy)]
pub(crate) struct Question {
    /// Its protocol.
    pub(crate) protocol: u8,
    /// The length in bytes of the longest packet on the wire, without the link's
    /// header; 0 for any.
    pub(crate) length: u16,
    /// A device that forwards: the packet is routed as if received there.
    pub(crate) device: u32,
}

/// Sends a packet whose source is the node's own address to its destination.
#[inline(never)]
pub(crate) fn send(ctx: &TcContext, tuple: &Tuple, question: &Question) -> Way {
    let mut lookup = zeroed();
    lookup.l4_protocol = question.protocol;
    lookup.sport = tuple.source_port.to_be();
    lookup.dport = tuple.destination_port.to_be();
    lookup.__bindgen_anon_1.tot_len = question.length;
    lookup.ifindex = question.device;
    set_addresses(&mut lookup, &tuple.source, &tuple.destination);
    match ask(ctx.as_ptr(), &mut lookup) {
        BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH => {}
        BPF_FIB_LKUP_RET_FRAG_NEEDED => return Way::TooBig,
        _ => return Way::None,
    }
    // SAFETY: the kernel has written the next hop there, of the family that it says; an
    // IPv4 one is the first word.
    let next = unsafe { lookup.__bindgen_anon_4.ipv6_dst };
    Way::Out(hand_to(lookup.ifindex, lookup.family, next))
}

/// Sends a packet to a neighbour on `device` that has a link-local address: of these the
/// routing tables say nothing.
#[inline(never)]
pub(crate) fn send_on_link(device: u32, neighbor: &Address) -> Way {
    Way::Out(hand_to(device, AF_INET6, neighbor.words()))
}

#[inline(always)]
fn hand_to(device: u32, family: u8, next: [u32; 4]) -> i32 {
    // SAFETY: the structure is made of numbers.
    let mut neighbor: bpf_redir_neigh = unsafe { core::mem::zeroed() };
    neighbor.nh_family = u32::from(family);
    neighbor.__bindgen_anon_1.ipv6_nh = next;
    let length = size_of::<bpf_redir_neigh>() as i32;
    // SAFETY: the structure is of the length that is given with it.
    unsafe { bpf_redirect_neigh(device, &mut neighbor, length, 0) as i32 }
}
