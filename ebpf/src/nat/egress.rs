//! tc egress of the devices by which packets leave the node: what pods send is
//! masqueraded.

use aya_ebpf::{bindings::TC_ACT_UNSPEC, macros::classifier, programs::TcContext};

/// The program of uplinks with Ethernet headers.
#[classifier]
pub(crate) fn egress(_ctx: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

/// The program of uplinks without: tunnels.
#[classifier]
pub(crate) fn egress_l3(_ctx: TcContext) -> i32 {
    TC_ACT_UNSPEC
}
