//! A tc context as the translation sees it.

use aya_ebpf::{
    bindings::{
        BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM,
        bpf_hdr_start_off::BPF_HDR_START_MAC,
    },
    helpers::{
        bpf_csum_update, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_redirect_peer,
        bpf_skb_change_head, bpf_skb_load_bytes_relative,
    },
    programs::TcContext,
};
use bpf_bridge_common::{
    drops::DropReason,
    frame::{ETH_HLEN, ETH_P_IP, ETH_P_IPV6},
    layout::Mac,
    packet::{Covered, Packet, Version},
};

use crate::shared::{PACKET_HOST, skb};

/// The mark of a packet that a program has translated: nobody need look again whose it is.
pub(crate) const OURS: u32 = 0x6266;

/// Whether the packet has it.
#[inline(always)]
pub(crate) fn is_marked(ctx: &TcContext) -> bool {
    // SAFETY: the context is valid for as long as the program runs.
    unsafe { (*skb(ctx)).tc_index == OURS }
}

/// A frame in a tc program.
#[derive(Clone, Copy)]
pub(crate) struct Skb<'a>(pub(crate) &'a TcContext);

impl Packet for Skb<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.0.load(at).ok()
    }

    #[inline(always)]
    fn store<const N: usize>(&mut self, at: usize, bytes: [u8; N]) -> Option<()> {
        self.0.store(at, &bytes, 0).ok()
    }

    #[inline(always)]
    fn store_uncovered<const N: usize>(&mut self, at: usize, bytes: [u8; N]) -> Option<()> {
        self.0
            .store(at, &bytes, u64::from(BPF_F_RECOMPUTE_CSUM))
            .ok()
    }

    #[inline(always)]
    fn fix_header_checksum(&mut self, at: usize, diff: u32) -> Option<()> {
        // SAFETY: the context is the program's own.
        let result = unsafe { bpf_l3_csum_replace(skb(self.0), at as u32, 0, u64::from(diff), 0) };
        (result == 0).then_some(())
    }

    /// The kernel knows how much of the checksum is the sender's, the device's or its
    /// own affair; only a helper can ask.
    #[inline(always)]
    fn fix_transport_checksum(&mut self, at: usize, diff: u32, covered: Covered) -> Option<()> {
        let mut flags = 0;
        if covered.pseudo_header {
            flags |= u64::from(BPF_F_PSEUDO_HDR);
        }
        if covered.udp {
            flags |= u64::from(BPF_F_MARK_MANGLED_0);
        }
        // SAFETY: the context is the program's own.
        let result =
            unsafe { bpf_l4_csum_replace(skb(self.0), at as u32, 0, u64::from(diff), flags) };
        if covered.pseudo_header && covered.ipv6 {
            // The helper takes from the device's sum of the whole packet what the new
            // addresses add, as if an IPv4 header checksum had made up for them. Put
            // it back: in IPv6 the two changes cancel each other. (Only a packet that
            // has such a sum is changed; BPF_F_IPV6 would do the same, since 6.16.)
            // SAFETY: as above.
            unsafe { bpf_csum_update(skb(self.0), diff) };
        }
        (result == 0).then_some(())
    }
}

impl Skb<'_> {
    /// The frame's ethertype in host byte order.
    #[inline(always)]
    pub(crate) fn ethertype(self) -> u16 {
        // SAFETY: the context is valid for as long as the program runs.
        u16::from_be(unsafe { (*skb(self.0)).protocol } as u16)
    }

    /// Makes sure that the frame of a device with Ethernet headers begins with its own.
    ///
    /// Generic XDP may copy a frame before it passes it on, and the kernel forgets the
    /// length of the header over that (`skb_pp_cow_data`, seen with 6.18): the frame then
    /// seems to begin with the IP header.
    #[inline(always)]
    pub(crate) fn restore_link_header(self) -> Option<()> {
        let ethertype = self.ethertype();
        let start = self.0.data();
        if !matches!(ethertype, ETH_P_IP | ETH_P_IPV6) || start + ETH_HLEN > self.0.data_end() {
            return Some(());
        }
        // SAFETY: the frame is that long, and begins at an even address.
        let field = unsafe { ((start + ETH_HLEN - 2) as *const u16).read() };
        if u16::from_be(field) == ethertype {
            return Some(());
        }
        self.put_link_header_back()
    }

    #[inline(never)]
    fn put_link_header_back(self) -> Option<()> {
        let mut header = [0u8; ETH_HLEN];
        // SAFETY: the buffer is as long as its length says, and the context is the
        // program's own.
        unsafe {
            let loaded = bpf_skb_load_bytes_relative(
                skb(self.0).cast(),
                0,
                header.as_mut_ptr().cast(),
                ETH_HLEN as u32,
                BPF_HDR_START_MAC,
            );
            if loaded != 0 || bpf_skb_change_head(skb(self.0), ETH_HLEN as u32, 0) != 0 {
                return None;
            }
        }
        self.0.store(0, &header, 0).ok()
    }

    /// Whether a VLAN tag waits beside the frame.
    #[inline(always)]
    pub(crate) fn is_tagged(self) -> bool {
        // SAFETY: as above.
        unsafe { (*skb(self.0)).vlan_present != 0 }
    }

    /// Whether the frame is addressed to the device that received it.
    #[inline(always)]
    pub(crate) fn is_for_this_host(self) -> bool {
        // SAFETY: as above.
        unsafe { (*skb(self.0)).pkt_type == PACKET_HOST }
    }

    /// The length of a segment's data if segmentation is left to the device, else 0.
    #[inline(always)]
    pub(crate) fn segment_size(self) -> u32 {
        // SAFETY: as above.
        unsafe { (*skb(self.0)).gso_size }
    }

    /// Gives a frame of a device without a link layer an Ethernet header.
    #[inline(always)]
    pub(crate) fn add_link_header(self, version: Version) -> Option<()> {
        // SAFETY: the context is the program's own.
        if unsafe { bpf_skb_change_head(skb(self.0), ETH_HLEN as u32, 0) } != 0 {
            return None;
        }
        let ethertype = match version {
            Version::V4 => ETH_P_IP,
            Version::V6 => ETH_P_IPV6,
        };
        self.0.store(12, &ethertype.to_be_bytes(), 0).ok()
    }

    /// Straight into the pod behind the host veth `port`.
    #[inline(always)]
    pub(crate) fn into_pod(self, port: u32, mac: Mac, from: Mac) -> Result<i32, DropReason> {
        let [a, b, c, d, e, f] = mac;
        let [g, h, i, j, k, l] = from;
        let addresses = [a, b, c, d, e, f, g, h, i, j, k, l];
        self.0
            .store(0, &addresses, 0)
            .map_err(|_| DropReason::Helper)?;
        self.deliver(port)
    }

    /// The same for a frame that has the pod's MAC address already.
    #[inline(always)]
    pub(crate) fn deliver(self, port: u32) -> Result<i32, DropReason> {
        self.0.set_mark(0);
        // See `port`, which has the same need.
        self.0
            .change_type(PACKET_HOST)
            .map_err(|_| DropReason::Helper)?;
        // SAFETY: a helper that takes numbers.
        Ok(unsafe { bpf_redirect_peer(port, 0) } as i32)
    }
}
