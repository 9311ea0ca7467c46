//! Devices, addresses, routes, packet filters, sockets, offloads and sysctls, through
//! rtnetlink, sock_diag, ethtool and procfs.
//!
//! [`Netlink`] is a connection to the rtnetlink of one network namespace; its
//! methods are blocking and each is one request, but where it says otherwise. A
//! pod's set-up takes two connections: one of the host, which creates the veth
//! pair with its peer already inside the sandbox, and one of the sandbox.
//!
//! Nothing here scans: devices are looked up by index or name, and what the
//! kernel only offers as a dump is asked for one device, filtered by the kernel.
//! [`Netlink::all_addresses`] is as long as the node has addresses, pods not counted.

mod address;
mod device;
mod diag;
mod filter;
mod netlink;
pub mod nftables;
mod offload;
mod route;
pub mod sysctl;
#[cfg(test)]
pub(crate) mod testing;

pub use self::{
    address::Address,
    device::{Ipv4Conf, Link, LinkSettings, VethIndices, VethSpec, Xdp},
    diag::{DiagError, Listener, SockDiag},
    filter::Hook,
    netlink::{LinkError, Netlink},
    offload::enable_gro,
    route::{MAIN_TABLE, Route},
};
