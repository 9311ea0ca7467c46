//! The Internet checksum (RFC 1071), kept right while bytes under it change
//! (RFC 1624).
//!
//! Words are taken as they lie in memory: the sum does not depend on the byte
//! order (RFC 1071 §2 (B)), and a difference is what `bpf_l3_csum_replace` and
//! `bpf_l4_csum_replace` take when their size is 0.

/// What a checksum's sum changes by when `old` becomes `new`; 16 bits, so that
/// differences can be added to each other.
///
/// `N` is even, and the bytes start at an even distance from the first that the
/// checksum covers.
#[inline(always)]
pub const fn diff<const N: usize>(old: [u8; N], new: [u8; N]) -> u32 {
    const { assert!(N.is_multiple_of(2) && N <= 64) }
    let mut sum = 0u64;
    let (mut old, mut new) = (old.as_slice(), new.as_slice());
    // Eight bytes at a time: the sum of wider words folds into the same (RFC 1071 §2 (C)).
    while let (Some((gone, old_rest)), Some((come, new_rest))) =
        (old.split_first_chunk(), new.split_first_chunk())
    {
        let gone = !u64::from_ne_bytes(*gone);
        let come = u64::from_ne_bytes(*come);
        sum += (gone >> 32) + (gone & 0xffff_ffff) + (come >> 32) + (come & 0xffff_ffff);
        (old, new) = (old_rest, new_rest);
    }
    while let (Some((gone, old_rest)), Some((come, new_rest))) =
        (old.split_first_chunk(), new.split_first_chunk())
    {
        let gone = !u16::from_ne_bytes(*gone);
        let come = u16::from_ne_bytes(*come);
        sum += gone as u64 + come as u64;
        (old, new) = (old_rest, new_rest);
    }
    fold(sum) as u32
}

/// The checksum after what it covers changed by `diff` (RFC 1624, equation 3).
#[inline(always)]
pub const fn adjust(checksum: [u8; 2], diff: u32) -> [u8; 2] {
    let sum = !u16::from_ne_bytes(checksum);
    (!fold(sum as u64 + diff as u64)).to_ne_bytes()
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
const fn fold(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    // 33 bits; each step leaves the carry of the one before.
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    sum as u16
}
