//! The programs that translate: what iptables' DNAT and MASQUERADE do elsewhere, and what
//! keeps the host's stack and these programs out of each other's way.
//!
//! | file | hook |
//! |---|---|
//! | [`uplink`] | tc ingress of the node's other devices: requests for published ports, answers to masqueraded pods |
//! | [`egress`] | tc egress of these devices: what masqueraded pods send |
//! | [`xdp`] | XDP of those of them that the operator names: the plain ones among the requests |
//! | [`from_pod`] | called by `port` for what pods send to the gateway: replies, and requests of pods |
//! | [`from_host`] | called by `port` for what the host sends to a pod |
//! | [`between`] | called by `port` for what pods send each other, if the host has its part in it |
//! | [`sockets`] | connect, sendmsg, recvmsg and getpeername of the node's own processes |
//!
//! A [`request`] is led by the static table of published ports, packet by packet, and
//! remembered as the pod sees it; a [`reply`] finds that memory and is undone.
//! Neither passes the host's stack. What the stack itself brings to a pod is remembered
//! too, so that its replies go back to the stack. [`masquerade`] is done where packets
//! leave the node, so the stack sees them as pods do.
//!
//! What is remembered has its place in somebody's [`share`].
//!
//! This object is loaded in parts, when a network needs them; [`shared`] has what it has
//! in common with the one that switches. Minimum kernel: 5.11 (`bpf_ktime_get_coarse_ns`).
#![no_std]
#![no_main]
#![allow(
    clippy::needless_borrows_for_generic_args,
    reason = "a key or value that is not borrowed is copied to the stack, which is small"
)]

mod between;
mod egress;
mod fib;
mod flow;
mod forward;
mod fragments;
mod from_host;
mod from_pod;
mod linear;
mod maps;
mod masquerade;
mod own;
mod reply;
mod request;
mod share;
#[path = "../shared.rs"]
mod shared;
mod skb;
mod sockets;
mod uplink;
mod work;
mod xdp;

/// The kernel gives its GPL-only helpers to programs that say this.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the verifier refuses a program that could loop here.
    loop {}
}
