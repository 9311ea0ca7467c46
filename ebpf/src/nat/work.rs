//! What a program has at hand while it works on one packet.
//!
//! It is more than the 512 bytes of a BPF stack, so it lives in a map, one copy a CPU:
//! tc programs are not interrupted by each other. For the same reason the larger steps
//! are functions of their own, with a stack frame each.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_INGRESS},
    btf_maps::{PerCpuArray, lpm_trie::Key},
    helpers::bpf_ktime_get_coarse_ns,
    macros::btf_map,
    programs::TcContext,
};
use bpf_bridge_common::{
    drops::DropReason,
    frame::{ETH_HLEN, ETH_P_IP, ETH_P_IPV6},
    layout::{ExemptKey, Flow, FlowKey, Mac, PodKey, Reply, ReplyKey},
    packet::{Packet as _, Parsed, Tuple, is_sound, parse, parse_plain, quoted},
    translate::{rewrite, rewrite_inner, rewrite_outer},
};

use crate::{
    fib::Exit,
    linear::Linear,
    masquerade::Owner,
    own::{self, Step},
    reply::Back,
    share::Share,
    shared::skb,
    skb::Skb,
};

/// The state of one packet.
pub(crate) struct Work {
    /// The packet.
    pub(crate) parsed: Parsed,
    /// Its part in its connection.
    pub(crate) step: Step,
    /// The packet that it is about, if it is an ICMP error.
    pub(crate) inner: Parsed,
    /// What the packet, or the inner one, is to become.
    pub(crate) to: Tuple,
    /// The addresses that an error is to have.
    pub(crate) outer: Tuple,
    /// Where it comes from.
    pub(crate) from: From,
    /// The flow that is looked for.
    pub(crate) key: FlowKey,
    /// The flow that is made.
    pub(crate) flow: Flow,
    /// The same flow as others see it.
    pub(crate) reply_key: ReplyKey,
    /// And who has begun it.
    pub(crate) reply: Reply,
    /// Who sends it.
    pub(crate) owner: Owner,
    /// The pod that is looked for.
    pub(crate) pod_key: PodKey,
    /// The destination that may be exempt, behind the length of the prefix.
    pub(crate) exempt: Key<ExemptKey>,
    /// How it leaves the node.
    pub(crate) exit: Exit,
    /// How a reply goes back.
    pub(crate) back: Back,
    /// What changed under its checksum.
    pub(crate) diff: u32,
    /// The port that a drop is counted against.
    pub(crate) account: u32,
    /// What is at hand while an entry gets a place.
    pub(crate) share: Share,
}

/// Where a packet comes in.
#[derive(Clone, Copy)]
pub(crate) struct From {
    /// As [`Flow::from`].
    pub(crate) ifindex: u32,
    /// The segment of the port that it is, 0 for uplinks.
    pub(crate) segment: u32,
    /// As [`Flow::client_mac`].
    pub(crate) client_mac: Mac,
    /// As [`Flow::gateway_mac`].
    pub(crate) gateway_mac: Mac,
    /// Whether frames have an Ethernet header.
    pub(crate) linked: bool,
    /// How a frame gets there once more: received, or sent (`bpf_clone_redirect`).
    pub(crate) again: u32,
}

impl From {
    /// The host's stack.
    pub(crate) const STACK: Self = Self {
        ifindex: 0,
        segment: 0,
        client_mac: [0; 6],
        gateway_mac: [0; 6],
        linked: false,
        again: BPF_F_INGRESS,
    };
}

/// What became of a frame: a verdict, or why it was dropped. `None` if it is none of
/// ours.
pub(crate) type Outcome = Option<Result<i32, DropReason>>;

/// Takes a step in a function of its own.
///
/// An outcome that a function returned itself would be written where a pointer to its
/// caller's stack says. The compiler may leave that pointer in the register that is
/// returned, and the verifier refuses the program then.
#[inline(always)]
pub(crate) fn apart(step: impl FnOnce() -> Outcome) -> Outcome {
    let number = numbered(step);
    match (number >> 32, number as u32) {
        (0, verdict) => Some(Ok(verdict as i32)),
        (DROPPED, reason) => Some(Err(DropReason::from_number(reason)?)),
        _ => None,
    }
}

/// The upper half of an outcome's number, if it is not a verdict.
const DROPPED: u64 = 1;
const NOT_OURS: u64 = 2;

#[inline(never)]
fn numbered(step: impl FnOnce() -> Outcome) -> u64 {
    match step() {
        Some(Ok(verdict)) => u64::from(verdict as u32),
        Some(Err(reason)) => DROPPED << 32 | u64::from(reason as u32),
        None => NOT_OURS << 32,
    }
}

/// The time in ns, as of the last tick: what ages here ages by seconds, and a clock that is
/// as fine as can be costs more to read than a table. (`bpf_ktime_get_coarse_ns`, since 5.11.)
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: a helper that reads a clock.
    unsafe { bpf_ktime_get_coarse_ns() }
}

#[btf_map]
static WORK: PerCpuArray<Work, 1> = PerCpuArray::new();

impl Work {
    /// This CPU's.
    #[inline(always)]
    pub(crate) fn get() -> Option<&'static mut Self> {
        // SAFETY: nothing else on this CPU has it while a program runs; it is numbers,
        // for which all zeroes, as the map begins, is a value.
        WORK.get_ptr_mut(0).map(|work| unsafe { &mut *work })
    }

    /// Reads the packet, whose IP header is at offset `l3` of the frame, and says
    /// whether there is one.
    #[inline(always)]
    pub(crate) fn read(&mut self, ctx: &TcContext, l3: usize) -> bool {
        l3 == ETH_HLEN && self.read_plain(ctx) || read_any(skb(ctx), self, l3 as u32) != 0
    }

    /// Most packets: nothing is searched for, and the kernel is not asked for bytes.
    #[inline(never)]
    fn read_plain(&mut self, ctx: &TcContext) -> bool {
        let frame = Linear(ctx);
        let parsed = match Skb(ctx).ethertype() {
            ETH_P_IP => parse_plain(&frame, ETH_HLEN, ETH_P_IP),
            ETH_P_IPV6 => parse_plain(&frame, ETH_HLEN, ETH_P_IPV6),
            _ => None,
        };
        match parsed {
            Some(parsed) => {
                self.step = own::step(&frame, &parsed);
                self.parsed = parsed;
            }
            None => return false,
        }
        true
    }

    /// The same for a packet that the host's stack has not looked at: one that it would
    /// drop is left to it.
    #[inline(always)]
    pub(crate) fn read_received(&mut self, ctx: &TcContext, l3: usize) -> bool {
        self.read(ctx, l3) && is_sound_packet(skb(ctx), self) != 0
    }

    /// Notes where a client on the same link is, so that it can be answered there.
    #[inline(always)]
    pub(crate) fn note_client(&mut self, ctx: &TcContext) -> Option<()> {
        let [a, b, c, d, e, f, g, h, i, j, k, l] = Skb(ctx).load(0)?;
        self.from.gateway_mac = [a, b, c, d, e, f];
        self.from.client_mac = [g, h, i, j, k, l];
        Some(())
    }

    /// Reads the packet that the packet at hand is an error about, and says whether
    /// there is one.
    #[inline(always)]
    pub(crate) fn read_error(&mut self, ctx: &TcContext) -> bool {
        read_quoted(skb(ctx), self) != 0
    }

    /// Makes the packet what it is to become.
    #[inline(always)]
    pub(crate) fn rewrite(&mut self, ctx: &TcContext) -> bool {
        rewrite_packet(skb(ctx), self) != 0
    }

    /// Makes the error, and the packet that it is about, what they are to become.
    #[inline(always)]
    pub(crate) fn rewrite_error(&mut self, ctx: &TcContext) -> bool {
        rewrite_quoted(skb(ctx), self) != 0 && rewrite_error(skb(ctx), self) != 0
    }
}

// Global functions, which the verifier looks at once, and not once for each way that leads to
// them: they take numbers, a context, and memory that may not be there.

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn read_any(skb: *mut __sk_buff, work: *mut Work, l3: u32) -> u32 {
    // SAFETY: what is not null is a `Work`, and nobody else's.
    let Some(work) = (unsafe { work.as_mut() }) else {
        return 0;
    };
    let ctx = TcContext::new(skb);
    let skb = Skb(&ctx);
    match parse(&skb, l3 as usize, skb.ethertype()) {
        Some(parsed) => {
            work.step = own::step(&skb, &parsed);
            work.parsed = parsed;
            1
        }
        None => 0,
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn is_sound_packet(skb: *mut __sk_buff, work: *mut Work) -> u32 {
    // SAFETY: as in `read_any`.
    let Some(work) = (unsafe { work.as_ref() }) else {
        return 0;
    };
    let ctx = TcContext::new(skb);
    let (skb, parsed) = (Skb(&ctx), &work.parsed);
    let room = (ctx.len() as usize).saturating_sub(parsed.l3 as usize);
    let segmented = skb.segment_size() != 0;
    let plain = parsed.with_plain_offsets(ETH_HLEN, ETH_P_IP);
    let offsets = |parsed: &Parsed| (parsed.version, parsed.l3, parsed.l4);
    let sound = offsets(parsed) == offsets(&plain)
        && is_sound(&Linear(&ctx), &plain, room, segmented)
        || is_sound(&skb, parsed, room, segmented);
    u32::from(sound)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn read_quoted(skb: *mut __sk_buff, work: *mut Work) -> u32 {
    // SAFETY: as in `read_any`.
    let Some(work) = (unsafe { work.as_mut() }) else {
        return 0;
    };
    match quoted(&Skb(&TcContext::new(skb)), &work.parsed) {
        Some(inner) => {
            work.inner = inner;
            1
        }
        None => 0,
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rewrite_packet(skb: *mut __sk_buff, work: *mut Work) -> u32 {
    // SAFETY: as in `read_any`.
    let Some(work) = (unsafe { work.as_ref() }) else {
        return 0;
    };
    let done = rewrite(&mut Skb(&TcContext::new(skb)), &work.parsed, &work.to);
    u32::from(done.is_some())
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rewrite_quoted(skb: *mut __sk_buff, work: *mut Work) -> u32 {
    // SAFETY: as in `read_any`.
    let Some(work) = (unsafe { work.as_mut() }) else {
        return 0;
    };
    match rewrite_inner(&mut Skb(&TcContext::new(skb)), &work.inner, &work.to) {
        Some(diff) => {
            work.diff = diff;
            1
        }
        None => 0,
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rewrite_error(skb: *mut __sk_buff, work: *mut Work) -> u32 {
    // SAFETY: as in `read_any`.
    let Some(work) = (unsafe { work.as_ref() }) else {
        return 0;
    };
    let Tuple {
        source,
        destination,
        ..
    } = &work.outer;
    let ctx = TcContext::new(skb);
    let done = rewrite_outer(&mut Skb(&ctx), &work.parsed, source, destination, work.diff);
    u32::from(done.is_some())
}
