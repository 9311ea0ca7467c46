//! Masquerade: what a pod asks others appears as the node's own, and what they answer is
//! the pod's again.
//!
//! A flow is remembered twice, as the pod sees it (`FLOWS`) and as others do (`REPLIES`).
//! Either is made again from the other when it was forgotten. What netfilter translates
//! itself is remembered as well, so that two never use one port.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_ANY, BPF_NOEXIST, TC_ACT_UNSPEC},
    btf_maps::lpm_trie::Key,
    programs::TcContext,
};
use bpf_bridge_common::{
    drops::DropReason,
    layout::{
        Address, CONNECTION_IDLE_NS, ENDED_NS, ExemptKey, FLOW_DIRECT, FLOW_MASQUERADED,
        FLOW_REFRESH_NS, Flow, FlowKey, MASQUERADE_IDLE_NS, Masqueraded, PodKey, REPLY_DIRECT,
        REPLY_ENDED, Reply, ReplyKey, USED_MASQUERADED, USED_NOTED, is_older,
    },
    packet::{IPPROTO_SCTP, IPPROTO_TCP, Parsed, Query, Tuple},
};

use crate::{
    fib::{self, Leaving},
    maps::{EXEMPT, FLOWS, MASQUERADED, REPLIES, UPLINKS, USED, published},
    own::{self, Step},
    share,
    shared::PORTS,
    work::{Outcome, Work, now},
};

/// How many ports are tried before a flow is refused. With half of all taken, one flow in a
/// thousand finds none.
const ATTEMPTS: u32 = 10;

/// The flow goes on as it is now.
pub(crate) const GO_ON: Outcome = Some(Ok(TC_ACT_UNSPEC));

/// Who a flow belongs to.
#[derive(Clone, Copy)]
pub(crate) struct Owner {
    /// The ifindex of the pod's host veth, 0 for the host's stack.
    pub(crate) port: u32,
    /// The segment by which its packets come, 0 for the node's own.
    pub(crate) segment: u32,
    /// The device by which they leave.
    pub(crate) device: u32,
    /// `FLOW_*` bits.
    pub(crate) flags: u32,
    /// The pod's policy, 0 if it is no pod.
    pub(crate) policy: u64,
}

/// The pod that has `address` in `segment`, if it is masqueraded.
#[inline(always)]
pub(crate) fn pod(
    key: &mut PodKey,
    address: &Address,
    segment: u32,
) -> Option<&'static Masqueraded> {
    key.address = *address;
    key.segment = segment;
    // SAFETY: the plugin replaces entries of this map whole.
    unsafe { MASQUERADED.get(&*key) }
}

/// Whether what the pod sends to `destination` keeps the pod's address.
#[inline(always)]
pub(crate) fn is_exempt(key: &mut Key<ExemptKey>, policy: u64, destination: &Address) -> bool {
    *key = Key::new(
        8 * size_of::<ExemptKey>() as u32,
        ExemptKey::new(policy, *destination),
    );
    EXEMPT.get(key).is_some()
}

/// Sets `key` to the flow of a packet that `port` sends.
#[inline(always)]
pub(crate) fn set_flow_key(key: &mut FlowKey, tuple: &Tuple, protocol: u8, port: u32) {
    key.pod = tuple.source;
    key.pod_port = tuple.source_port;
    key.client = tuple.destination;
    key.client_port = tuple.destination_port;
    key.port = port;
    key.protocol = protocol;
    key.reserved = [0; 3];
}

/// Sets `key` to the flow of a packet that answers.
#[inline(always)]
pub(crate) fn set_reply_key(key: &mut ReplyKey, answer: &Tuple, protocol: u8) {
    key.remote = answer.source;
    key.remote_port = answer.source_port;
    key.local = answer.destination;
    key.local_port = answer.destination_port;
    key.protocol = protocol;
    key.reserved = [0; 3];
}

/// The answer to a packet.
#[inline(always)]
pub(crate) const fn answer(tuple: &Tuple) -> Tuple {
    Tuple {
        source: tuple.destination,
        destination: tuple.source,
        source_port: tuple.destination_port,
        destination_port: tuple.source_port,
    }
}

/// Finds as whom the packet leaves that `work.owner` sends, or settles it, and sets
/// `work.to`. `None` if it leaves as it is.
#[expect(
    clippy::collapsible_match,
    reason = "a masqueraded flow that cannot be kept is not for the arms below"
)]
#[inline(always)]
pub(crate) fn settle(ctx: &TcContext, work: &mut Work) -> Option<Result<(), DropReason>> {
    // It comes from there, so that the verifier knows nothing of it: all that lead here are
    // one case.
    let owner = &{ work.owner };
    let step = work.step;
    set_flow_key(
        &mut work.key,
        &work.parsed.tuple,
        work.parsed.protocol,
        owner.port,
    );
    // SAFETY: an entry that is evicted meanwhile is memory of the map still; at worst a
    // store is lost.
    let known = FLOWS
        .get_ptr_mut(&work.key)
        .map(|flow| unsafe { &mut *flow });
    let forgotten = known.is_none();
    match known {
        Some(flow) if flow.flags & FLOW_MASQUERADED != 0 => {
            if flow.from == owner.device && is_kept(ctx, work, owner, flow, step) {
                work.to = work.parsed.tuple;
                work.to.source = flow.original;
                work.to.source_port = flow.original_port;
                return Some(Ok(()));
            }
        }
        // It is not the pod that has begun it.
        Some(flow) if step != Step::Begins && lasts(flow, work.parsed.protocol) => {
            let now = now();
            if is_older(now, flow.seen, FLOW_REFRESH_NS) {
                flow.seen = now;
            }
            return None;
        }
        _ if owner.policy != 0 => {
            if is_exempt(
                &mut work.exempt,
                owner.policy,
                &work.parsed.tuple.destination,
            ) {
                return None;
            }
            set_reply_key(
                &mut work.reply_key,
                &answer(&work.parsed.tuple),
                work.parsed.protocol,
            );
            if step == Step::Answers
                || work.parsed.is_icmp() && work.parsed.query != Query::Request
                || forgotten && step != Step::Begins && REPLIES.get_ptr(&work.reply_key).is_some()
            {
                // Somebody else has begun it, by the pod's own address.
                return None;
            }
        }
        _ => {}
    }
    Some(match begin(ctx, work, owner, step) {
        BEGUN => Ok(()),
        reason => Err(DropReason::from_number(reason).unwrap_or(DropReason::Helper)),
    })
}

/// Whether a flow that somebody else has begun still lasts, now that the pod sends a packet
/// of it. Of a connection it says itself when a new one begins.
#[inline(always)]
fn lasts(flow: &Flow, protocol: u8) -> bool {
    protocol == IPPROTO_TCP || !is_older(now(), flow.seen, MASQUERADE_IDLE_NS)
}

/// What [`begin`] says if it is not the number of a reason.
const BEGUN: u32 = u32::MAX;

/// Whether a flow that is known can go on as it is.
#[inline(always)]
fn is_kept(ctx: &TcContext, work: &mut Work, owner: &Owner, flow: &mut Flow, step: Step) -> bool {
    set_reply_key(
        &mut work.reply_key,
        &answer(&work.parsed.tuple),
        work.parsed.protocol,
    );
    work.reply_key.local = flow.original;
    work.reply_key.local_port = flow.original_port;
    let now = now();
    let Some(reply) = REPLIES.get_ptr_mut(&work.reply_key) else {
        // Forgotten.
        describe(work, owner, now);
        return REPLIES
            .insert(&work.reply_key, &work.reply, u64::from(BPF_NOEXIST))
            .is_ok();
    };
    // SAFETY: as in `settle`.
    let reply = unsafe { &mut *reply };
    if !is_of(reply, owner, &work.parsed.tuple) {
        // It was idle, and somebody else has needed the port.
        return false;
    }
    note(reply, step);
    if !is_older(now, reply.seen, FLOW_REFRESH_NS) {
        return true;
    }
    reply.seen = now;
    flow.seen = now;
    // If the plugin has written the word at the same time.
    use_port(
        work.reply_key.local_port,
        work.parsed.protocol == IPPROTO_TCP,
    );
    owner.segment == 0
        || fib::is_local(
            ctx.as_ptr(),
            owner.segment,
            &work.parsed.tuple.source,
            &flow.original,
        )
}

/// Notes what the packet says of the flow's end.
#[inline(always)]
pub(crate) fn note(reply: &mut Reply, step: Step) {
    match step {
        Step::Ends if reply.flags & REPLY_ENDED == 0 => reply.flags |= REPLY_ENDED,
        Step::Begins if reply.flags & REPLY_ENDED != 0 => reply.flags &= !REPLY_ENDED,
        _ => {}
    }
}

/// Begins a flow: chooses an address and a port, and remembers them. The number of the
/// reason if that cannot be.
#[inline(never)]
fn begin(ctx: &TcContext, work: &mut Work, owner: &Owner, step: Step) -> u32 {
    work.to = work.parsed.tuple;
    if owner.port != 0 {
        match address(ctx, work, owner) {
            Some(address) => work.to.source = address,
            None => return DropReason::NoAddress as u32,
        }
    }
    set_reply_key(&mut work.reply_key, &answer(&work.to), work.parsed.protocol);
    // What begins is not looked for under later ports.
    let thorough = work.parsed.protocol == IPPROTO_TCP && step != Step::Begins;
    let found = find(ctx, work, owner, thorough);
    work.to.source_port = work.reply_key.local_port;
    // If it cannot be remembered, another CPU was faster.
    if found != Found::Full && remember(work, owner, found, step) {
        BEGUN
    } else {
        DropReason::Exhausted as u32
    }
}

/// As whom the packet leaves.
#[inline(always)]
fn address(ctx: &TcContext, work: &mut Work, owner: &Owner) -> Option<Address> {
    let tuple = &work.parsed.tuple;
    let leaving = Leaving {
        via: owner.segment,
        device: owner.device,
        length: 0,
        protocol: work.parsed.protocol,
    };
    if fib::exit(ctx, tuple, &leaving, &mut work.exit)
        && let exit = work.exit
        && !exit.address.is_unspecified()
        && !exit.address.is_link_local()
    {
        return Some(exit.address);
    }
    // SAFETY: the plugin replaces entries of this map whole.
    let uplink = unsafe { UPLINKS.get(owner.device) }?;
    let address = if tuple.source.is_v4() {
        uplink.v4
    } else {
        uplink.v6
    };
    (!address.is_unspecified()).then_some(address)
}

/// What came of looking for a port.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    /// The flow is known under it.
    Known,
    /// It is free.
    Free,
    /// Its flow has been idle.
    Idle,
    /// None is.
    Full,
}

/// What [`find`] has seen so far.
struct Search {
    /// Whether the flow may be known under a later port than one that is free.
    thorough: bool,
    /// The best port,
    port: u16,
    /// and what it is.
    found: Found,
}

/// Looks for a port of the node, and sets it in `work.reply_key`.
#[inline(never)]
fn find(ctx: &TcContext, work: &mut Work, owner: &Owner, thorough: bool) -> Found {
    let mut search = Search {
        thorough,
        port: 0,
        found: Found::Full,
    };
    let mut attempt = 0;
    while attempt < ATTEMPTS && !is_last(ctx, work, owner, attempt, &mut search) {
        attempt += 1;
    }
    if search.found == Found::Full && owner.port == 0 && work.from.segment == 0 {
        // No pod silences the node itself.
        search.port = work.parsed.tuple.source_port;
        search.found = Found::Idle;
    }
    work.reply_key.local_port = search.port;
    search.found
}

/// One attempt; says whether it is the last. (A function of its own: what the compiler makes
/// of a longer loop has a way back that is no jump, which Linux 6.1 refuses.)
#[inline(never)]
fn is_last(
    ctx: &TcContext,
    work: &mut Work,
    owner: &Owner,
    attempt: u32,
    search: &mut Search,
) -> bool {
    let port = candidate(&work.parsed, attempt);
    work.reply_key.local_port = port;
    match REPLIES.get_ptr(&work.reply_key) {
        Some(reply) => {
            // SAFETY: as in `settle`.
            let reply = unsafe { &*reply };
            if is_of(reply, owner, &work.parsed.tuple) {
                (search.port, search.found) = (port, Found::Known);
                return true;
            }
            if search.found == Found::Full && is_idle(reply, now(), work.parsed.protocol) {
                (search.port, search.found) = (port, Found::Idle);
            }
        }
        None => {
            if search.found != Found::Free && is_admissible(ctx, &work.reply_key) {
                (search.port, search.found) = (port, Found::Free);
                if !search.thorough {
                    return true;
                }
            }
        }
    }
    !has_choice(&work.parsed)
}

/// Whether the flow can have another port than its own.
#[inline(always)]
fn has_choice(parsed: &Parsed) -> bool {
    parsed.is_transport() && parsed.protocol != IPPROTO_SCTP || parsed.is_query()
}

/// Whether the flow is the one that is looked for.
#[inline(always)]
fn is_of(reply: &Reply, owner: &Owner, tuple: &Tuple) -> bool {
    reply.port == owner.port
        && reply.inner_port == tuple.source_port
        && reply.address == tuple.source
}

/// Whether somebody who needs its port may have it.
#[inline(always)]
fn is_idle(reply: &Reply, now: u64, protocol: u8) -> bool {
    if reply.port != 0 && PORTS.get_ptr(reply.port).is_none() {
        // The pod is gone.
        return true;
    }
    let limit = match protocol {
        IPPROTO_TCP if reply.flags & REPLY_ENDED != 0 => ENDED_NS,
        IPPROTO_TCP => CONNECTION_IDLE_NS,
        _ => MASQUERADE_IDLE_NS,
    };
    is_older(now, reply.seen, limit)
}

/// Whether nobody else uses the port: no pod publishes it, and no process of the node has
/// it.
#[inline(always)]
fn is_admissible(ctx: &TcContext, key: &ReplyKey) -> bool {
    let answer = Tuple {
        source: key.remote,
        destination: key.local,
        source_port: key.remote_port,
        destination_port: key.local_port,
    };
    published(&key.local, key.local_port, key.protocol).is_none()
        && !own::is_heard(ctx.as_ptr(), &answer, key.protocol)
}

/// The port of the attempt: the flow's own, then others that follow from the flow. Those
/// of privileged ones are privileged (RFC 4787, REQ-3 allows it, NFS may need it).
#[inline(always)]
fn candidate(parsed: &Parsed, attempt: u32) -> u16 {
    let tuple = &parsed.tuple;
    let own = tuple.source_port;
    // An identifier of 0 looks like none.
    if attempt == 0 && (own != 0 || !parsed.is_query()) {
        return own;
    }
    let mut hash = (u32::from(own) << 16) | u32::from(tuple.destination_port);
    hash ^= tuple.source.words()[3] ^ tuple.destination.words()[3].rotate_left(16);
    hash = (hash ^ attempt.wrapping_mul(0x9e37_79b9)).wrapping_mul(0x85eb_ca6b);
    hash ^= hash >> 15;
    let (first, last): (u32, u32) = if own < 1024 && !parsed.is_query() {
        (600, 1023)
    } else {
        (1024, 65_535)
    };
    (first + (((hash & 0xffff) * (last + 1 - first)) >> 16)) as u16
}

#[inline(always)]
fn describe(work: &mut Work, owner: &Owner, now: u64) {
    let direct = if owner.flags & FLOW_DIRECT != 0 {
        REPLY_DIRECT
    } else {
        0
    };
    work.reply = Reply {
        seen: now,
        address: work.parsed.tuple.source,
        port: owner.port,
        inner_port: work.parsed.tuple.source_port,
        flags: direct,
    };
}

/// Remembers the flow both ways; says whether it could.
#[inline(never)]
fn remember(work: &mut Work, owner: &Owner, found: Found, step: Step) -> bool {
    let now = now();
    if found == Found::Known {
        // It may have been silent for long: its answers are to be heard again.
        if let Some(reply) = REPLIES.get_ptr_mut(&work.reply_key) {
            // SAFETY: as in `settle`.
            let reply = unsafe { &mut *reply };
            note(reply, step);
            reply.seen = now;
        }
    } else {
        describe(work, owner, now);
        let flags = if found == Found::Free {
            BPF_NOEXIST
        } else {
            BPF_ANY
        };
        // A full table evicts.
        let _ = REPLIES.insert(&work.reply_key, &work.reply, u64::from(flags));
        // Not only to be sure: a fresh entry that was never looked up counts as unused,
        // and could be the next to be evicted.
        let there = REPLIES.get_ptr(&work.reply_key);
        // SAFETY: as in `settle`.
        if !there.is_some_and(|there| is_of(unsafe { &*there }, owner, &work.parsed.tuple)) {
            return false;
        }
    }
    use_port(
        work.reply_key.local_port,
        work.parsed.protocol == IPPROTO_TCP,
    );
    let tuple = work.parsed.tuple;
    remember_flow(work, &tuple, owner);
    true
}

/// Where it is said of a port what it was used for.
#[inline(always)]
fn used(port: u16) -> Option<*mut u8> {
    let word = USED.get_ptr_mut(u32::from(port) / 8)?;
    // SAFETY: a word has eight bytes.
    Some(unsafe { word.cast::<u8>().add(usize::from(port % 8)) })
}

/// Notes that `REPLIES` has an entry for `port`, and whether it is of a pod's connection.
#[inline(always)]
fn use_port(port: u16, is_connection: bool) {
    let bits = if is_connection {
        USED_NOTED | USED_MASQUERADED
    } else {
        USED_NOTED
    };
    if let Some(used) = used(port) {
        // SAFETY: the byte is always there. If another CPU writes it at the same time, it is
        // noted all the same.
        unsafe {
            if *used & bits != bits {
                *used |= bits;
            }
        }
    }
}

/// Whether answers to `port` may have been to a pod.
#[inline(always)]
pub(crate) fn is_used(port: u16) -> bool {
    // SAFETY: as in `use_port`.
    used(port).is_some_and(|used| unsafe { *used } & USED_MASQUERADED != 0)
}

/// Who has begun the flow of `key`, if it is known. Most ports never had one: a byte that is
/// read says so sooner than the table.
#[inline(always)]
pub(crate) fn replied(key: &ReplyKey) -> Option<&'static mut Reply> {
    // SAFETY: as in `use_port`.
    if unsafe { *used(key.local_port)? } == 0 {
        return None;
    }
    // SAFETY: as in `settle`.
    REPLIES.get_ptr_mut(key).map(|reply| unsafe { &mut *reply })
}

/// Remembers the flow of `sent` as the pod sees it.
#[inline(always)]
fn remember_flow(work: &mut Work, sent: &Tuple, owner: &Owner) {
    work.flow = Flow {
        seen: now(),
        #[cfg(feature = "next-layout")]
        next: 0,
        original: work.reply_key.local,
        client: sent.destination,
        original_port: work.reply_key.local_port,
        client_port: sent.destination_port,
        from: owner.device,
        client_mac: [0; 6],
        gateway_mac: [0; 6],
        flags: FLOW_MASQUERADED | owner.flags,
    };
    if FLOWS.get_ptr(&work.key).is_none() && !share::of_flow(work.key.port) {
        return;
    }
    let _ = FLOWS.insert(&work.key, &work.flow, u64::from(BPF_ANY));
    let _ = FLOWS.get_ptr(&work.key);
}

/// Says of a flow of the stack's that it is in use.
#[inline(always)]
pub(crate) fn touch(reply: &mut Reply, step: Step) {
    note(reply, step);
    let now = now();
    if is_older(now, reply.seen, FLOW_REFRESH_NS) {
        reply.seen = now;
    }
}

/// Remembers that the answers that `work.reply_key` says are the stack's affair.
#[inline(always)]
pub(crate) fn cede(work: &mut Work) {
    work.reply = Reply {
        seen: now(),
        address: work.reply_key.local,
        port: 0,
        inner_port: work.reply_key.local_port,
        flags: 0,
    };
    let _ = REPLIES.insert(&work.reply_key, &work.reply, u64::from(BPF_NOEXIST));
    let _ = REPLIES.get_ptr(&work.reply_key);
    use_port(work.reply_key.local_port, false);
}

/// What is known of a packet that comes back, if its flow is known; sets `work.to`.
#[inline(always)]
pub(crate) fn recall(work: &mut Work) -> Option<&'static Reply> {
    let step = work.step;
    set_reply_key(
        &mut work.reply_key,
        &work.parsed.tuple,
        work.parsed.protocol,
    );
    let reply = replied(&work.reply_key)?;
    let now = now();
    if reply.port != 0
        && (work.parsed.protocol != IPPROTO_TCP || step == Step::Begins)
        && is_idle(reply, now, work.parsed.protocol)
    {
        // It does not answer: nothing was asked for long.
        return None;
    }
    note(reply, step);
    if is_older(now, reply.seen, MASQUERADE_IDLE_NS / 2) {
        // Nor is who only hears idle. (Mostly it is the pod's packets that say so.)
        reply.seen = now;
    }
    work.to = work.parsed.tuple;
    work.to.destination = reply.address;
    work.to.destination_port = reply.inner_port;
    Some(reply)
}

/// Remembers the flow of an answer as the pod sees it, if that was forgotten.
#[inline(always)]
pub(crate) fn restore(work: &mut Work, reply: &Reply) {
    let answer = answer(&work.to);
    set_flow_key(&mut work.key, &answer, work.parsed.protocol, reply.port);
    if FLOWS.get_ptr(&work.key).is_some() {
        return;
    }
    let direct = if reply.flags & REPLY_DIRECT != 0 {
        FLOW_DIRECT
    } else {
        0
    };
    let owner = Owner {
        port: reply.port,
        segment: 0,
        device: work.from.ifindex,
        flags: direct,
        policy: 0,
    };
    remember_flow(work, &answer, &owner);
}
