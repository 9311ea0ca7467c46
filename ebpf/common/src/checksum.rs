//! The Internet checksum (RFC 1071), kept right while bytes under it change
//! (RFC 1624).
//!
//! Words are taken as they lie in memory: the sum does not depend on the byte
//! order (RFC 1071 §2 (B)), and a difference is what `bpf_l3_csum_replace` and
//! `bpf_l4_csum_replace` take when their size is 0.

/// What a checksum's sum changes by when `old` becomes `new`.
///
/// `N` is even, and the bytes start at an even distance from the first that the
/// checksum covers. Differences may be added to each other.
#[inline(always)]
pub const fn diff<const N: usize>(old: [u8; N], new: [u8; N]) -> u32 {
    const { assert!(N.is_multiple_of(2) && N <= 64) }
    let mut sum = 0u32;
    let (mut old, mut new) = (old.as_slice(), new.as_slice());
    while let ([a, b, old_rest @ ..], [c, d, new_rest @ ..]) = (old, new) {
        let gone = !u16::from_ne_bytes([*a, *b]);
        let come = u16::from_ne_bytes([*c, *d]);
        sum = sum.wrapping_add(gone as u32).wrapping_add(come as u32);
        (old, new) = (old_rest, new_rest);
    }
    sum
}

/// The checksum after what it covers changed by `diff` (RFC 1624, equation 3).
#[inline(always)]
pub const fn adjust(checksum: [u8; 2], diff: u32) -> [u8; 2] {
    let sum = !u16::from_ne_bytes(checksum);
    (!fold((fold(diff) as u32).wrapping_add(sum as u32))).to_ne_bytes()
}

/// [`adjust`] for UDP, where zero says that there is no checksum (RFC 768).
#[inline(always)]
pub const fn adjust_udp(checksum: [u8; 2], diff: u32) -> [u8; 2] {
    match checksum {
        [0, 0] => [0, 0],
        _ => match adjust(checksum, diff) {
            [0, 0] => [0xff, 0xff],
            adjusted => adjusted,
        },
    }
}

/// Adds the carries back in; zero only if `sum` is zero.
#[inline(always)]
const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}
