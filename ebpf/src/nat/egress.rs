//! tc egress of the devices by which packets leave the node: what masqueraded pods send
//! gets the node's address.
//!
//! The host's stack has seen the packet as the pod has sent it, and sees the answer as
//! it goes to the pod: whatever it knows of the flow, it knows both ways.

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::classifier,
    programs::TcContext,
};
use bpf_bridge_common::{
    drops::DropReason,
    frame::{ETH_HLEN, ETH_P_IP, ETH_P_IPV6},
    layout::{Address, FLOW_MASQUERADED, Masqueraded},
    packet::{Fragment, IPPROTO_TCP, IPPROTO_UDP, Packet as _, Query, Version},
};

use crate::{
    fib,
    fragments::{self, Standing},
    maps::{ADDRESSES, FLOWS},
    masquerade::{self, GO_ON, Owner},
    own, share,
    shared::{PORTS, count_drop, ifindex, set_mark, skb},
    skb::{Skb, is_marked},
    work::{From, Outcome, Work, apart},
};

/// The program of uplinks with Ethernet headers.
#[classifier]
pub(crate) fn egress(ctx: TcContext) -> i32 {
    send(&ctx, ETH_HLEN)
}

/// The program of uplinks without: tunnels.
#[classifier]
pub(crate) fn egress_l3(ctx: TcContext) -> i32 {
    send(&ctx, 0)
}

#[inline(always)]
fn send(ctx: &TcContext, l3: usize) -> i32 {
    if Skb(ctx).is_tagged() {
        // Of a VLAN device, which has its own program.
        return TC_ACT_UNSPEC;
    }
    if is_marked(ctx) {
        // Straight from a pod: it has what it needs.
        set_mark(ctx, 0);
        return TC_ACT_UNSPEC;
    }
    // SAFETY: the context is valid for as long as the program runs.
    let came_by = unsafe { (*skb(ctx)).ingress_ifindex };
    let Some(work) = Work::get() else {
        return TC_ACT_UNSPEC;
    };
    work.from = From {
        segment: came_by,
        ifindex: ifindex(ctx),
        linked: l3 != 0,
        again: 0,
        ..From::STACK
    };
    match translate(ctx, work, l3) {
        Some(Ok(verdict)) => verdict,
        Some(Err(reason)) => {
            count_drop(work.account, reason);
            TC_ACT_SHOT
        }
        // Other programs of this hook run.
        None => TC_ACT_UNSPEC,
    }
}

#[inline(always)]
fn translate(ctx: &TcContext, work: &mut Work, l3: usize) -> Outcome {
    if !work.read(ctx, l3) {
        return unreadable(ctx, work, l3);
    }
    if work.parsed.tuple.destination.is_group() {
        return None;
    }
    let is_bare = work.parsed.is_bare_icmp();
    let is_error = is_bare && work.read_error(ctx);
    let parsed = &work.parsed;
    if work.from.segment == 0 && parsed.fragment != Fragment::Whole && parsed.version == Version::V6
    {
        // The stack forgets where a packet came from when it cuts it (`ip6_copy_metadata`).
        work.from.segment = fib::toward(ctx, work.from.ifindex, &parsed.tuple.source);
    }
    let segment = work.from.segment;
    // The node's own come from no device.
    let pod = if segment == 0 {
        None
    } else {
        masquerade::pod(&mut work.pod_key, &work.parsed.tuple.source, segment)
    };
    work.owner = Owner {
        port: 0,
        segment: 0,
        device: work.from.ifindex,
        flags: 0,
        policy: 0,
    };
    match pod {
        Some(pod) => {
            work.account = pod.port;
            work.owner.port = pod.port;
            work.owner.segment = segment;
            work.owner.policy = pod.policy;
            if is_bare && !is_error {
                // What neighbours tell each other, or nobody knows.
                return unreadable(ctx, work, l3);
            }
            if work.parsed.fragment != Fragment::Whole {
                match complete(ctx, work, pod)? {
                    Ok(()) => {}
                    Err(done) => return Some(done),
                }
            }
            if is_error {
                return apart(|| error_of_pod(ctx, work, pod));
            }
        }
        None if is_error && segment == 0 => return apart(|| own_error(ctx, work)),
        None if is_bare => return None,
        None => {
            work.account = 0;
            match standing(ctx, work) {
                Other::Alone => return None,
                Other::Denies => return Some(Err(DropReason::NotTranslatable)),
                Other::Collides => {}
            }
        }
    }
    apart(|| match masquerade::settle(ctx, work)? {
        Ok(()) if work.rewrite(ctx) => GO_ON,
        Ok(()) => Some(Err(DropReason::Helper)),
        Err(reason) => Some(Err(reason)),
    })
}

/// What has headers that are not understood may not leave with a pod's address either.
#[inline(never)]
fn pod_of_unreadable(ctx: &TcContext, work: &mut Work, l3: usize) -> bool {
    let skb = Skb(ctx);
    let tuple = &mut work.parsed.tuple;
    match skb.ethertype() {
        ETH_P_IP => {
            let Some([a, b, c, d, e, f, g, h]) = skb.load(l3 + 12) else {
                return false;
            };
            tuple.source = Address::v4([a, b, c, d]);
            tuple.destination = Address::v4([e, f, g, h]);
        }
        ETH_P_IPV6 => {
            let (Some(source), Some(destination)) = (skb.load(l3 + 8), skb.load(l3 + 24)) else {
                return false;
            };
            tuple.source = Address::v6(source);
            tuple.destination = Address::v6(destination);
        }
        _ => return false,
    }
    let Some(pod) = masquerade::pod(&mut work.pod_key, &tuple.source, work.from.segment) else {
        return false;
    };
    work.account = pod.port;
    !tuple.destination.is_group()
        && !masquerade::is_exempt(&mut work.exempt, pod.policy, &tuple.destination)
}

#[inline(always)]
fn unreadable(ctx: &TcContext, work: &mut Work, l3: usize) -> Outcome {
    pod_of_unreadable(ctx, work, l3).then_some(Err(DropReason::NotTranslatable))
}

/// Completes a fragment that a masqueraded pod sends. `None` if it leaves as it is, an
/// error with what becomes of it if it cannot go on.
#[inline(always)]
fn complete(
    ctx: &TcContext,
    work: &mut Work,
    pod: &Masqueraded,
) -> Option<Result<(), Result<i32, DropReason>>> {
    if masquerade::is_exempt(&mut work.exempt, pod.policy, &work.parsed.tuple.destination) {
        return None;
    }
    Some(match fragments::complete(ctx, work, pod.port, true) {
        Standing::Known => Ok(()),
        Standing::Unknown => Err(Err(DropReason::NotTranslatable)),
        Standing::Done => Err(Ok(TC_ACT_SHOT)),
    })
}

/// What a masqueraded pod says about an answer that it got.
#[inline(always)]
fn error_of_pod(ctx: &TcContext, work: &mut Work, pod: &Masqueraded) -> Outcome {
    masquerade::set_flow_key(
        &mut work.key,
        &masquerade::answer(&work.inner.tuple),
        work.inner.protocol,
        pod.port,
    );
    // SAFETY: an entry that is evicted meanwhile is memory of the map still.
    let Some(flow) = (unsafe { FLOWS.get(&work.key) }) else {
        if masquerade::is_exempt(&mut work.exempt, pod.policy, &work.parsed.tuple.destination) {
            return None;
        }
        return Some(Err(DropReason::NotTranslatable));
    };
    if flow.flags & FLOW_MASQUERADED == 0 {
        return None;
    }
    work.to = work.inner.tuple;
    work.to.destination = flow.original;
    work.to.destination_port = flow.original_port;
    work.outer = work.parsed.tuple;
    work.outer.source = flow.original;
    Some(if work.rewrite_error(ctx) {
        Ok(TC_ACT_UNSPEC)
    } else {
        Err(DropReason::Helper)
    })
}

/// What the node says about an answer to a masqueraded pod, which it could not pass on.
#[inline(always)]
fn own_error(ctx: &TcContext, work: &mut Work) -> Outcome {
    let about = masquerade::answer(&work.inner.tuple);
    let segment = fib::toward(ctx, work.from.ifindex, &about.source);
    let pod = masquerade::pod(&mut work.pod_key, &about.source, segment)?;
    work.account = pod.port;
    masquerade::set_flow_key(&mut work.key, &about, work.inner.protocol, pod.port);
    // SAFETY: as above.
    let flow = unsafe { FLOWS.get(&work.key) }?;
    if flow.flags & FLOW_MASQUERADED == 0 {
        return None;
    }
    work.to = work.inner.tuple;
    work.to.destination = flow.original;
    work.to.destination_port = flow.original_port;
    work.outer = work.parsed.tuple;
    Some(if work.rewrite_error(ctx) {
        Ok(TC_ACT_UNSPEC)
    } else {
        Err(DropReason::Helper)
    })
}

/// What leaves with the node's own address: of its processes, or translated by netfilter,
/// or by us already.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum Other {
    /// It is nobody else's.
    Alone,
    /// It could be taken for a pod's.
    Collides,
    /// The node does not know a connection that may be a forgotten one of a pod: it would
    /// end it. The pod's next packet brings it back.
    Denies,
}

#[inline(never)]
fn standing(ctx: &TcContext, work: &mut Work) -> Other {
    if work.parsed.fragment == Fragment::Later {
        return Other::Alone;
    }
    masquerade::set_reply_key(
        &mut work.reply_key,
        &masquerade::answer(&work.parsed.tuple),
        work.parsed.protocol,
    );
    let Some(reply) = masquerade::replied(&work.reply_key) else {
        if work.from.segment == 0
            && own::is_denial(&Skb(ctx), &work.parsed)
            && masquerade::is_used(work.reply_key.local_port)
        {
            return Other::Denies;
        }
        note_stack(work);
        return Other::Alone;
    };
    if reply.port == 0 {
        if reply.inner_port != work.parsed.tuple.source_port {
            // One of the stack's own flows was given this port, when it had to give way.
            return Other::Collides;
        }
        masquerade::touch(reply, work.step);
        return Other::Alone;
    }
    let came_by = work.from.segment;
    // SAFETY: the plugin replaces entries of this map whole.
    let pod = unsafe { PORTS.get(reply.port) };
    if pod.is_some_and(|pod| pod.segment != came_by) {
        Other::Collides
    } else {
        // Ours, translated.
        Other::Alone
    }
}

/// Remembers a flow that netfilter has translated (the node forwards it, under its own
/// address), and one of the node itself that no socket tells of when it is asked.
#[inline(always)]
fn note_stack(work: &mut Work) {
    let came_by = work.from.segment;
    let noted = if came_by == 0 {
        !matches!(work.parsed.protocol, IPPROTO_TCP | IPPROTO_UDP)
            && work.parsed.query != Query::Reply
    } else {
        true
    };
    if noted && ADDRESSES.get_ptr(&work.parsed.tuple.source).is_some() && share::of_reply(came_by) {
        masquerade::cede(work);
    }
}
