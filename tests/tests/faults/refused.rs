//! Every request is refused once: the call says so, or does without; and then nothing is
//! left of it, or the next DEL or GC finds all of it.

use nix::libc;

use super::*;

/// The kinds of requests, and what the kernel says of them.
const NETLINK: (&str, i32) = ("netlink", libc::ENOBUFS);
const BPF: (&str, i32) = ("bpf", libc::ENOMEM);
const FILE: (&str, i32) = ("file", libc::ENOSPC);

/// Whether requests after the one that is refused are refused as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AndThen {
    /// They are not.
    Peace,
    /// All of them: nothing can be undone.
    Nothing,
}

/// Refuses each request of a call in turn, or each of `step`.
fn refuse_each(
    stage: &Stage<'_>,
    victim: Victim,
    (kind, errno): (&str, i32),
    and_then: AndThen,
    step: usize,
) -> Result<()> {
    let mark = match and_then {
        AndThen::Peace => "",
        AndThen::Nothing => "+",
    };
    for number in (1..).step_by(step) {
        let reply = stage.call(victim, &format!("fail:{kind}:{number}{mark}:{errno}"))?;
        let fault = reply.stderr.trim().to_owned();
        if !fault.contains("fault: failed") {
            reply.success()?;
            ensure!(number > 1, "nothing was refused");
            return stage.clean();
        }
        let undone = and_then == AndThen::Peace;
        after(stage, victim, &reply, undone)
            .with_context(|| format!("{victim:?}, {kind} {number}{mark}: {fault}"))?;
    }
    Ok(())
}

/// What a call that something was refused has told, and left.
fn after(stage: &Stage<'_>, victim: Victim, reply: &Reply, undone: bool) -> Result<()> {
    // An answer in any case.
    let failed = !reply.status.success();
    if failed {
        let error = reply.failure()?;
        ensure!(error.code != 0 && !error.msg.is_empty(), "{error:?}");
    }
    match victim {
        Victim::Add | Victim::FailingAdd if failed && undone => stage.ensure_gone()?,
        Victim::Add | Victim::FailingAdd => {
            // Else it was not noted that the runtime has the answer.
            if !failed && !reply.stderr.contains("bpf-bridge: warning: ") {
                stage.ensure_like(&stage.with)?;
            }
            stage.network.del(&stage.victim.1)?;
            stage.ensure_gone()?;
        }
        Victim::Del => {
            if failed {
                stage.network.del(&stage.victim.1)?;
            }
            stage.ensure_gone()?;
        }
        Victim::Gc => {
            if failed {
                stage.network.gc(&stage.valid())?;
            }
            stage.ensure_gone()?;
        }
    }
    if stage.before == Before::Fresh {
        stage.clean()?;
    }
    Ok(())
}

fn plain(node: &Node) -> Result<Stage<'_>> {
    Stage::new(node, config(node, &json!({})), false, Before::Inhabited)
}

fn outside(node: &Node) -> Result<Stage<'_>> {
    let more = json!({"ipMasq": true, "ipMasqExempt": ["192.0.2.0/24"]});
    Stage::new(node, config(node, &more), true, Before::Inhabited)
}

fn nftables(node: &Node) -> Result<Stage<'_>> {
    let more = json!({"ipMasq": true, "ipMasqBackend": "nftables"});
    Stage::new(node, config(node, &more), false, Before::Empty)
}

fn each(
    network: impl Fn(&Node) -> Result<Stage<'_>>,
    kind: (&str, i32),
    victims: &[Victim],
) -> Result<()> {
    let node = node()?;
    let stage = network(&node)?;
    for &victim in victims {
        refuse_each(&stage, victim, kind, AndThen::Peace, 1)?;
    }
    Ok(())
}

#[test]
fn netlink_of_an_add() -> Result<()> {
    each(plain, NETLINK, &[Victim::Add])
}

#[test]
fn netlink_of_a_del_or_gc() -> Result<()> {
    each(plain, NETLINK, &[Victim::Del, Victim::Gc])
}

#[test]
fn netlink_of_a_network_that_publishes_and_masquerades() -> Result<()> {
    each(outside, NETLINK, &[Victim::Add, Victim::Del, Victim::Gc])
}

#[test]
fn netlink_of_a_network_that_netfilter_masquerades() -> Result<()> {
    each(nftables, NETLINK, &[Victim::Add, Victim::Del, Victim::Gc])
}

#[test]
fn bpf() -> Result<()> {
    each(outside, BPF, &[Victim::Add, Victim::Del, Victim::Gc])
}

#[test]
fn files() -> Result<()> {
    each(plain, FILE, &[Victim::Add, Victim::Del, Victim::Gc])
}

#[test]
fn everything_of_the_first_add_of_a_node() -> Result<()> {
    let node = node()?;
    let stage = Stage::new(&node, config(&node, &json!({})), false, Before::Fresh)?;
    for kind in [NETLINK, BPF] {
        refuse_each(&stage, Victim::Add, kind, AndThen::Peace, 2)?;
    }
    Ok(())
}

#[test]
fn everything_from_some_request_on() -> Result<()> {
    let node = node()?;
    let stage = outside(&node)?;
    for kind in [NETLINK, BPF, FILE] {
        for victim in [Victim::Add, Victim::Del, Victim::Gc] {
            refuse_each(&stage, victim, kind, AndThen::Nothing, 3)?;
        }
    }
    Ok(())
}
