//! Why a frame was not delivered.

/// The reason for a drop; its number is the index into [`PortStats::drops`].
///
/// [`PortStats::drops`]: crate::layout::PortStats::drops
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DropReason {
    /// The frame is shorter than an Ethernet header.
    Truncated = 0,
    /// The device carries the program but has no entry in `PORTS`.
    NotAPort = 1,
    /// The source address is a group address or all zeroes (IEEE 802.3 §3.2.3;
    /// `br_handle_frame` drops these too).
    BadSource = 2,
    /// `macspoofchk` is set, and the source is not the MAC address that was assigned, or
    /// an IP address that was assigned to another port.
    Spoofed = 3,
    /// Both ports are isolated (`portIsolation`).
    Isolated = 4,
    /// The destination is behind the port that the frame came from, and the port
    /// has no `hairpinMode`.
    SamePort = 5,
    /// A pause frame, which is never forwarded (IEEE 802.1D §7.12.6).
    Pause = 6,
    /// The frame could not be rewritten or handed over: a helper returned an error.
    Helper = 7,
    /// No source port is left under which the pod could tell a client of a
    /// published port from others.
    NoSourcePort = 8,
    /// There is no route back to the client of a published port.
    NoRoute = 9,
    /// No port of the node is left under which the pod could be masqueraded: all that
    /// were tried are in use to the same destination.
    Exhausted = 10,
    /// The device by which the packet leaves has no address to masquerade with.
    NoAddress = 11,
    /// A packet that cannot be masqueraded: a fragment without its first one, or a
    /// message about nothing that is known.
    NotTranslatable = 12,
    /// It says of an address that was assigned to another port that it is at the
    /// sender's, or that the sender knows a better router than the gateway; or it could
    /// say so to its receiver, behind more headers than are looked at.
    Claimed = 13,
}

impl DropReason {
    /// How many reasons there are.
    pub const COUNT: usize = 14;

    /// Every reason, in the order of its number.
    pub const ALL: [Self; Self::COUNT] = [
        Self::Truncated,
        Self::NotAPort,
        Self::BadSource,
        Self::Spoofed,
        Self::Isolated,
        Self::SamePort,
        Self::Pause,
        Self::Helper,
        Self::NoSourcePort,
        Self::NoRoute,
        Self::Exhausted,
        Self::NoAddress,
        Self::NotTranslatable,
        Self::Claimed,
    ];

    /// The reason with this number.
    #[inline(always)]
    pub const fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::Truncated,
            1 => Self::NotAPort,
            2 => Self::BadSource,
            3 => Self::Spoofed,
            4 => Self::Isolated,
            5 => Self::SamePort,
            6 => Self::Pause,
            7 => Self::Helper,
            8 => Self::NoSourcePort,
            9 => Self::NoRoute,
            10 => Self::Exhausted,
            11 => Self::NoAddress,
            12 => Self::NotTranslatable,
            13 => Self::Claimed,
            _ => return None,
        })
    }

    /// The name that is shown to people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Truncated => "truncated frame",
            Self::NotAPort => "not a port",
            Self::BadSource => "bad source address",
            Self::Spoofed => "spoofed source address",
            Self::Isolated => "isolated ports",
            Self::SamePort => "destination on the same port",
            Self::Pause => "pause frame",
            Self::Helper => "helper failed",
            Self::NoSourcePort => "no source port left",
            Self::NoRoute => "no route to the client",
            Self::Exhausted => "no port left to masquerade with",
            Self::NoAddress => "no address to masquerade with",
            Self::NotTranslatable => "cannot be masqueraded",
            Self::Claimed => "claims an assigned address",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_number() {
        for (number, reason) in DropReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, number, "{}", reason.name());
            assert_eq!(DropReason::from_number(number as u32), Some(reason));
        }
        assert_eq!(DropReason::from_number(DropReason::COUNT as u32), None);
    }
}
