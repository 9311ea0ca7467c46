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

/// The sum of `bytes`; sums and differences can be added to each other.
#[inline(always)]
pub const fn sum<const N: usize>(bytes: [u8; N]) -> u32 {
    diff([0xff; N], bytes)
}

/// Whether `field` is `sum` itself, and not its complement.
#[inline(always)]
pub const fn is_sum(field: [u8; 2], sum: u32) -> bool {
    u16::from_ne_bytes(field) == fold(sum as u64)
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The checksum of `bytes`, word by word in network order (RFC 1071 §1).
    fn checksum(bytes: &[u8]) -> [u8; 2] {
        let mut sum = 0u64;
        for word in bytes.chunks(2) {
            sum += u64::from(word[0]) << 8 | u64::from(word[1]);
        }
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        (!(sum as u16)).to_be_bytes()
    }

    #[test]
    fn the_example_of_rfc_1624() {
        // Section 4: 0xdd2f, a word goes from 0x5555 to 0x3285, and equation 3 gives zero
        // where others give 0xffff.
        let diff = diff([0x55, 0x55], [0x32, 0x85]);
        assert_eq!(adjust([0xdd, 0x2f], diff), [0, 0]);
        assert_eq!(adjust_udp([0xdd, 0x2f], diff), [0xff, 0xff]);
        assert_eq!(adjust_udp([0, 0], diff), [0, 0]);
    }

    proptest! {
        #[test]
        fn an_adjusted_checksum_is_that_of_the_new_bytes(
            old: [u8; 20],
            new: [u8; 20],
            rest: [u8; 6],
        ) {
            // Without it, bytes that are all zero have the one sum that no packet has.
            let bytes = |part: [u8; 20]| [&part[..], &rest, &[0, 1]].concat();
            let adjusted = adjust(checksum(&bytes(old)), diff(old, new));
            prop_assert_eq!(adjusted, checksum(&bytes(new)));
        }

        #[test]
        fn differences_add_up(old: [u8; 16], new: [u8; 16], ports: [u8; 4], to: [u8; 4]) {
            let sum = [1; 2];
            let at_once = adjust(sum, diff(old, new) + diff(ports, to));
            prop_assert_eq!(adjust(adjust(sum, diff(old, new)), diff(ports, to)), at_once);
        }
    }
}
