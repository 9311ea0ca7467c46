//! Sockets of the node's own processes: they are connected to the pod itself, and told
//! that they are connected to what they asked for. No packet of theirs is translated.
//!
//! The hooks see every socket of the node, pods' too; only those of the node's own
//! network namespace are meant. A pod's 127.0.0.1 is its own.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_ANY, bpf_sock, bpf_sock_addr},
    helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use bpf_bridge_common::layout::{Address, PeerKey, Published, Socket};

use crate::{
    maps::{ADDRESSES, NODE, PEERS, published},
    own,
};

/// The hooks can also refuse; these never do.
const GO_ON: i32 = 1;

macro_rules! hooks {
    ($($hook:ident: $name:ident = $work:ident::<$family:ident>;)*) => {$(
        #[doc = concat!("The hook `", stringify!($hook), "`.")]
        #[cgroup_sock_addr($hook)]
        pub(crate) fn $name(ctx: SockAddrContext) -> i32 {
            $work::<$family>(&ctx);
            GO_ON
        }
    )*};
}

hooks! {
    connect4: connect4 = ask::<V4>;
    connect6: connect6 = ask::<V6>;
    sendmsg4: sendmsg4 = send::<V4>;
    sendmsg6: sendmsg6 = send::<V6>;
    recvmsg4: recvmsg4 = hear::<V4>;
    recvmsg6: recvmsg6 = hear::<V6>;
    getpeername4: getpeername4 = hear::<V4>;
    getpeername6: getpeername6 = hear::<V6>;
}

/// Where the context has the address.
trait Family {
    /// # Safety
    ///
    /// The context is that of a hook of the family.
    unsafe fn address(ctx: *const bpf_sock_addr) -> Address;
    /// # Safety
    ///
    /// As above.
    unsafe fn set_address(ctx: *mut bpf_sock_addr, address: &Address);
    /// What the socket is bound to.
    ///
    /// # Safety
    ///
    /// The socket is one of the family.
    unsafe fn bound(socket: *const bpf_sock) -> Address;
}

struct V4;
struct V6;

impl Family for V4 {
    #[inline(always)]
    unsafe fn address(ctx: *const bpf_sock_addr) -> Address {
        // SAFETY: the caller's.
        Address::v4(unsafe { (*ctx).user_ip4 }.to_ne_bytes())
    }

    #[inline(always)]
    unsafe fn set_address(ctx: *mut bpf_sock_addr, address: &Address) {
        // SAFETY: the caller's.
        unsafe { (*ctx).user_ip4 = address.words()[3] };
    }

    #[inline(always)]
    unsafe fn bound(socket: *const bpf_sock) -> Address {
        // SAFETY: the caller's.
        Address::v4(unsafe { (*socket).src_ip4 }.to_ne_bytes())
    }
}

impl Family for V6 {
    #[inline(always)]
    unsafe fn address(ctx: *const bpf_sock_addr) -> Address {
        // Word by word: the verifier takes no other access to this field.
        // SAFETY: the caller's.
        Address::from_words(unsafe {
            [
                (&raw const (*ctx).user_ip6[0]).read_volatile(),
                (&raw const (*ctx).user_ip6[1]).read_volatile(),
                (&raw const (*ctx).user_ip6[2]).read_volatile(),
                (&raw const (*ctx).user_ip6[3]).read_volatile(),
            ]
        })
    }

    #[inline(always)]
    unsafe fn set_address(ctx: *mut bpf_sock_addr, address: &Address) {
        let [a, b, c, d] = address.words();
        // SAFETY: the caller's.
        unsafe {
            (&raw mut (*ctx).user_ip6[0]).write_volatile(a);
            (&raw mut (*ctx).user_ip6[1]).write_volatile(b);
            (&raw mut (*ctx).user_ip6[2]).write_volatile(c);
            (&raw mut (*ctx).user_ip6[3]).write_volatile(d);
        }
    }

    #[inline(always)]
    unsafe fn bound(socket: *const bpf_sock) -> Address {
        // SAFETY: the caller's.
        Address::from_words(unsafe {
            [
                (&raw const (*socket).src_ip6[0]).read_volatile(),
                (&raw const (*socket).src_ip6[1]).read_volatile(),
                (&raw const (*socket).src_ip6[2]).read_volatile(),
                (&raw const (*socket).src_ip6[3]).read_volatile(),
            ]
        })
    }
}

/// connect: whoever asks for a published port gets the pod.
#[inline(always)]
fn ask<F: Family>(ctx: &SockAddrContext) {
    if is_of_node(ctx) {
        lead::<F>(ctx);
    }
}

/// sendmsg without a connection: the same, and the answer must find its way back.
#[inline(always)]
fn send<F: Family>(ctx: &SockAddrContext) {
    if !is_of_node(ctx) {
        return;
    }
    // SAFETY: as in `lead`.
    let port = unsafe {
        let socket = (*ctx.sock_addr).__bindgen_anon_1.sk;
        if socket.is_null() {
            return;
        }
        (*socket).src_port as u16
    };
    own::remember(&socket::<F>(ctx), port);
    lead::<F>(ctx);
}

#[inline(always)]
fn lead<F: Family>(ctx: &SockAddrContext) {
    let asked = socket::<F>(ctx);
    // SAFETY: the context is valid for as long as the program runs.
    let protocol = unsafe { (*ctx.sock_addr).protocol } as u8;
    let Some(pod) = serving(&asked, protocol) else {
        return;
    };
    // Nothing leaves the node from a loopback address: who is bound to one is not led
    // astray, but refused by the stack.
    // SAFETY: the context is valid for as long as the program runs, and so is its
    // socket.
    let bound_to_loopback = unsafe {
        let socket = (*ctx.sock_addr).__bindgen_anon_1.sk;
        !socket.is_null() && F::bound(socket).is_loopback()
    };
    if bound_to_loopback {
        return;
    }
    let key = PeerKey {
        // SAFETY: as above.
        cookie: unsafe { bpf_get_socket_cookie(ctx.as_ptr()) },
        peer: Socket {
            address: pod.address,
            port: u32::from(pod.pod_port),
        },
        reserved: 0,
    };
    let _ = PEERS.insert(&key, &asked, u64::from(BPF_ANY));
    // A fresh entry that was never looked up counts as unused, and could be the next
    // to be evicted.
    let _ = PEERS.get_ptr(&key);
    set_socket::<F>(ctx, &key.peer);
}

/// recvmsg and getpeername: who talks to a pod is told what it asked for.
#[inline(always)]
fn hear<F: Family>(ctx: &SockAddrContext) {
    if !is_of_node(ctx) {
        return;
    }
    let key = PeerKey {
        // SAFETY: the context is valid for as long as the program runs.
        cookie: unsafe { bpf_get_socket_cookie(ctx.as_ptr()) },
        peer: socket::<F>(ctx),
        reserved: 0,
    };
    // SAFETY: an entry that is evicted meanwhile is memory of the map still.
    if let Some(asked) = unsafe { PEERS.get(&key) } {
        set_socket::<F>(ctx, asked);
    }
}

/// Who serves what the socket asks for.
#[inline(always)]
fn serving(asked: &Socket, protocol: u8) -> Option<&'static Published> {
    let address = meant(&asked.address);
    let pod = published(&address, asked.port as u16, protocol)?;
    let ours = address.is_loopback() || ADDRESSES.get_ptr(&address).is_some();
    ours.then_some(pod)
}

/// Linux takes a connection to the unspecified address as one to loopback.
#[inline(always)]
fn meant(address: &Address) -> Address {
    match (address.is_unspecified(), address.is_v4()) {
        (false, _) => *address,
        (true, true) => Address::LOOPBACK_V4,
        (true, false) => Address::LOOPBACK,
    }
}

/// Whether the socket is in the node's own network namespace.
#[inline(always)]
fn is_of_node(ctx: &SockAddrContext) -> bool {
    // SAFETY: the context is valid for as long as the program runs.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let Some(node) = NODE.get(0) else {
        return false;
    };
    let own = if node.netns == 0 {
        // SAFETY: without a context it is the machine's first namespace.
        unsafe { bpf_get_netns_cookie(core::ptr::null_mut()) }
    } else {
        node.netns
    };
    netns == own
}

#[inline(always)]
fn socket<F: Family>(ctx: &SockAddrContext) -> Socket {
    // SAFETY: the context is valid for as long as the program runs, and of the hook's
    // family.
    unsafe {
        Socket {
            address: F::address(ctx.sock_addr),
            port: u32::from(u16::from_be((*ctx.sock_addr).user_port as u16)),
        }
    }
}

#[inline(always)]
fn set_socket<F: Family>(ctx: &SockAddrContext, socket: &Socket) {
    // SAFETY: as above.
    unsafe {
        F::set_address(ctx.sock_addr, &socket.address);
        (*ctx.sock_addr).user_port = u32::from((socket.port as u16).to_be());
    }
}
