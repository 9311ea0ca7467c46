//! The part of a frame that a program reads and writes without asking the kernel: all of it
//! in XDP, mostly the headers in tc.

use aya_ebpf::programs::{TcContext, XdpContext};
use bpf_bridge_common::packet::Packet;

/// That part. Checksums are bytes like others here.
///
/// It starts at an even address, and so do its fields: they are read and written by
/// twos, for the instruction set makes single bytes as dear as words. Offsets must be known
/// when the program is compiled, or the verifier does not see that they were compared.
pub(crate) struct Linear<'a, C>(pub(crate) &'a C);

/// A context, which is asked anew each time: the verifier must see that the pointers are its
/// own.
pub(crate) trait Context {
    /// Where the part begins.
    fn start(&self) -> usize;
    /// Where it ends.
    fn end(&self) -> usize;
}

impl Context for TcContext {
    #[inline(always)]
    fn start(&self) -> usize {
        self.data()
    }

    #[inline(always)]
    fn end(&self) -> usize {
        self.data_end()
    }
}

impl Context for XdpContext {
    #[inline(always)]
    fn start(&self) -> usize {
        self.data()
    }

    #[inline(always)]
    fn end(&self) -> usize {
        self.data_end()
    }
}

impl<C: Context> Linear<'_, C> {
    /// Where `N` bytes from offset `at` on are; `None` if the frame ends before.
    #[inline(always)]
    fn place<const N: usize>(&self, at: usize) -> Option<*mut u16> {
        const { assert!(N.is_multiple_of(2)) }
        let start = self.0.start().wrapping_add(at);
        (start.wrapping_add(N) <= self.0.end()).then_some(start as *mut u16)
    }
}

impl<C: Context> Packet for Linear<'_, C> {
    #[inline(always)]
    fn load<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        let place = self.place::<N>(at)?;
        let mut bytes = [0; N];
        for (number, two) in bytes.as_chunks_mut().0.iter_mut().enumerate() {
            // SAFETY: the frame is that long.
            *two = unsafe { place.add(number).read() }.to_ne_bytes();
        }
        Some(bytes)
    }

    #[inline(always)]
    fn store<const N: usize>(&mut self, at: usize, bytes: [u8; N]) -> Option<()> {
        let place = self.place::<N>(at)?;
        for (number, two) in bytes.as_chunks().0.iter().enumerate() {
            // SAFETY: as above.
            unsafe { place.add(number).write(u16::from_ne_bytes(*two)) };
        }
        Some(())
    }
}
