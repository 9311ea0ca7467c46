//! Whoever holds a lock and hangs delays others by a bounded time, and is named; whoever
//! holds one and dies delays nobody.

use std::{
    fs::File,
    thread::{self, Scope, ScopedJoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use bpf_bridge_tests::{
    Attachment, Call, Network, Node, Pod, Reply, Tables, Verb, at_once, wait_for,
};
use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

/// The longest that a call may be delayed by others: what the module `lock` promises.
const BOUND: Duration = Duration::from_secs(25);
/// What a call may take besides, on a busy machine.
const SLACK: Duration = Duration::from_secs(15);
/// CNI's code for "try again later".
const TRY_AGAIN: u64 = 11;

/// Where the locks are, in the order in which an ADD takes them.
const ATTACHMENT: &str = "/run/bpf-bridge/attachments/net/hung:eth0";
const STORE: &str = "/var/lib/cni/networks/net/lock";
const BRIDGE: &str = "/run/bpf-bridge/bridges/cni0";
const PINS: &str = "/run/bpf-bridge/datapath.lock";
const PUBLISH: &str = "/run/bpf-bridge/publish.lock";

/// The first network, or another one with a bridge of its own.
fn config(node: &Node, number: u8, masquerades: bool) -> Value {
    let mut config = Network::dual_stack(node);
    config["cniVersion"] = json!("1.1.0");
    config["ipMasq"] = json!(masquerades);
    if number > 0 {
        config["name"] = json!(format!("net{number}"));
        config["bridge"] = json!(format!("cni{number}"));
        config["ipam"]["ranges"] = json!([[{"subnet": format!("10.{}.0.0/16", 80 + number)}]]);
    }
    config
}

fn call(network: &Network, verb: Verb, attachment: &Attachment) -> Result<Call> {
    let config = network.configs(Some(attachment))?.remove(0);
    Ok(network.call(&config, verb)?.attachment(attachment))
}

/// CHECK as it follows the pod's ADD.
fn check(network: &Network, pod: &Pod) -> Result<Call> {
    let mut config = network.configs(Some(pod.attachment()))?.remove(0);
    config["prevResult"] = pod.result().clone();
    Ok(network
        .call(&config, Verb::Check)?
        .attachment(pod.attachment()))
}

fn gc(network: &Network, valid: &[&Attachment]) -> Result<Call> {
    let mut config = network.configs(None)?.remove(0);
    config["cni.dev/valid-attachments"] = valid
        .iter()
        .map(|valid| json!({"containerID": valid.container_id, "ifname": valid.ifname}))
        .collect();
    network.call(&config, Verb::Gc)
}

/// Runs the plugin below strace, with arguments for that, as the plugin `name`.
fn install_traced(node: &Node, name: &str, arguments: &str) -> Result<()> {
    node.install_script(
        name,
        &format!(
            "#!/bin/sh\nexec strace -f -qq -y -e trace=flock {arguments} -o /run/{name}.trace {}/{}\n",
            Node::CNI_PATH,
            node.plugin()
        ),
    )
}

/// The process and the path of each lock that was asked for, from a trace.
fn asked_for(node: &Node, name: &str) -> Vec<(i32, String)> {
    let trace = node.read(format!("/run/{name}.trace")).unwrap_or_default();
    let parse = |line: &str| {
        let (pid, rest) = line.trim_start().split_once(' ')?;
        let (_, rest) = rest.split_once("flock(")?.1.split_once('<')?;
        Some((pid.parse().ok()?, rest.split_once('>')?.0.to_owned()))
    };
    trace.lines().filter_map(parse).collect()
}

/// The traced ADD of an attachment.
fn traced_add(network: &Network, attachment: &Attachment, name: &str) -> Result<Call> {
    let mut config = network.configs(Some(attachment))?.remove(0);
    config["type"] = json!(name);
    Ok(network.call(&config, Verb::Add)?.attachment(attachment))
}

/// An ADD that has stopped with a lock in its hands.
struct Hung<'scope> {
    pid: Pid,
    add: ScopedJoinHandle<'scope, Result<Reply>>,
}

impl<'scope> Hung<'scope> {
    /// Starts an ADD of the attachment that stops when it has the lock at `path`.
    fn start<'node: 'scope>(
        scope: &'scope Scope<'scope, '_>,
        network: &Network<'node>,
        attachment: &Attachment,
        path: &str,
    ) -> Result<Self> {
        let node = network.node();
        // Another one, to see which lock comes when.
        install_traced(node, "dry", "")?;
        let sandbox = node.sandbox("dry")?;
        let dry = sandbox.attachment();
        traced_add(network, &dry, "dry")?.run(node)?.success()?;
        network.del(&dry)?;
        let number = asked_for(node, "dry")
            .iter()
            .position(|(_, taken)| taken.replace("dry:", "hung:") == path)
            .with_context(|| format!("ADD does not take {path}: {:?}", asked_for(node, "dry")))?;
        let stop = format!("-e inject=flock:signal=SIGSTOP:when={}", number + 1);
        install_traced(node, "stopped", &stop)?;
        let add = traced_add(network, attachment, "stopped")?;
        let add = scope.spawn(move || add.run(node));
        let mut pid = 0;
        wait_for("ADD that stops", SLACK, || {
            let asked = asked_for(node, "stopped");
            let Some((stopped, at)) = asked.get(number) else {
                return Ok(false);
            };
            ensure!(at == path, "it stops at {at}");
            pid = *stopped;
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
            let state = stat.rsplit(')').next().unwrap_or_default().trim_start();
            Ok(state.starts_with(['t', 'T']))
        })?;
        let pid = Pid::from_raw(pid);
        Ok(Self { pid, add })
    }

    /// Ends it by the signal that nothing can be done about.
    fn kill(self) -> Result<()> {
        kill(self.pid, Signal::SIGKILL)?;
        let reply = self.add.join().map_err(|_| anyhow!("a panic"))??;
        ensure!(!reply.status.success(), "{reply:?}");
        Ok(())
    }
}

/// That each of these calls, made at once, gives up in time and names the holder.
fn give_up(node: &Node, holder: i32, calls: &[(&str, Call)]) -> Result<()> {
    let one = |number: usize| {
        let (what, call) = &calls[number];
        let reply = call.run(node)?;
        let error = reply.failure().with_context(|| what.to_string())?;
        ensure!(error.code == TRY_AGAIN, "{what}: {error:?}");
        let name = format!("process {holder} (");
        ensure!(
            error.text().contains(&name),
            "{what}, not {name}: {error:?}"
        );
        ensure!(
            reply.duration < BOUND + SLACK,
            "{what}: {:?}",
            reply.duration
        );
        Ok(())
    };
    at_once(calls.len(), one).into_iter().collect()
}

/// That the call is not delayed.
fn goes_on(node: &Node, what: &str, call: &Call) -> Result<()> {
    let reply = call.run(node)?;
    reply.success().context(what.to_owned())?;
    ensure!(reply.duration < SLACK, "{what} took {:?}", reply.duration);
    Ok(())
}

/// One who hangs, and the others: which calls give up, and which do not care.
fn case(path: &str) -> Result<()> {
    let node = Node::new()?;
    let _outside = node.outside()?;
    let masquerades = path == PUBLISH;
    let network = Network::new(&node, config(&node, 0, masquerades));
    let beside = Network::new(&node, config(&node, 1, masquerades));
    // Other programs than those that are loaded.
    let other = Network::new(&node, config(&node, 2, !masquerades));
    let (stays, leaves) = (network.pod("stays")?, network.pod("leaves")?);
    let beside_it = beside.pod("beside-it")?;
    let sandboxes = ["hung", "fresh", "new", "waits"]
        .map(|name| node.sandbox(name))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let [hung, fresh, new, waits] = &sandboxes[..] else {
        unreachable!("there are four")
    };
    let hung = hung.attachment();
    thread::scope(|scope| {
        let holder = Hung::start(scope, &network, &hung, path)?;
        let add = |network: &Network, name: &Attachment| call(network, Verb::Add, name);
        let add_fresh = add(&network, &fresh.attachment())?;
        let add_new = add(&beside, &new.attachment())?;
        // A runtime tells GC of all that it is about to add.
        let own = [stays.attachment(), leaves.attachment(), &fresh.attachment()];
        let collect = gc(&network, &own)?;
        let delete = call(&network, Verb::Del, leaves.attachment())?;
        let checked = check(&network, &stays)?;
        let (waiting, going): (Vec<_>, Vec<_>) = match path {
            ATTACHMENT => (
                vec![
                    ("ADD of the same", add(&network, &hung)?),
                    ("DEL of the same", call(&network, Verb::Del, &hung)?),
                    ("GC", collect),
                ],
                vec![("ADD", add_fresh), ("CHECK", checked), ("DEL", delete)],
            ),
            STORE => (
                vec![
                    ("ADD", add_fresh),
                    ("DEL", delete),
                    ("GC", collect),
                    ("CHECK", checked),
                ],
                vec![("ADD elsewhere", add_new)],
            ),
            BRIDGE => (
                vec![("ADD", add_fresh), ("DEL", delete), ("GC", collect)],
                vec![("ADD elsewhere", add_new), ("CHECK", checked)],
            ),
            PINS => (
                vec![
                    (
                        "GC elsewhere",
                        gc(&beside, &[beside_it.attachment(), &new.attachment()])?,
                    ),
                    ("first ADD with ipMasq", add(&other, &fresh.attachment())?),
                ],
                vec![("ADD elsewhere", add_new), ("CHECK", checked)],
            ),
            _ => (
                vec![("ADD elsewhere", add_new)],
                vec![("ADD without ipMasq", add(&other, &fresh.attachment())?)],
            ),
        };
        let beside_the_point = || {
            going
                .iter()
                .try_for_each(|(what, call)| goes_on(&node, what, call))
        };
        let (gave_up, went_on) = thread::scope(|scope| {
            let going = scope.spawn(beside_the_point);
            let gave_up = give_up(&node, holder.pid.as_raw(), &waiting);
            (gave_up, going.join().map_err(|_| anyhow!("a panic")))
        });
        let waits = waits.attachment();
        let waiter = add(&network, &waits)?;
        let waiter = scope.spawn({
            let node = &node;
            move || waiter.run(node)
        });
        thread::sleep(Duration::from_millis(300));
        holder.kill()?;
        gave_up?;
        went_on??;
        // The kernel has given the lock on.
        let reply = waiter.join().map_err(|_| anyhow!("a panic"))??;
        reply.success().context("ADD that waited")?;
        ensure!(reply.duration < SLACK, "{:?}", reply.duration);
        network.del(&waits)
    })?;
    // Nothing is in anybody's way, and of what gave up nothing is left.
    network.add(&hung)?;
    network.check(&hung)?;
    network.del(&hung)?;
    for (network, sandbox) in [(&network, fresh), (&other, fresh), (&beside, new)] {
        network.del(&sandbox.attachment())?;
    }
    network.del(leaves.attachment())?;
    network.gc(&[stays.attachment()])?;
    network.check(stays.attachment())?;
    beside.check(beside_it.attachment())?;
    for address in stays.addresses() {
        node.ping(address, 1)?;
    }
    let leases = node.run("ls /var/lib/cni/networks/net /var/lib/cni/networks/net1")?;
    let leases = leases.lines().filter(|name| name.starts_with("10."));
    ensure!(
        leases.clone().count() == 2,
        "{:?}",
        leases.collect::<Vec<_>>()
    );
    Tables::read(&node)?.ensure_consistent()
}

#[test]
fn a_holder_that_hangs_delays_others_by_a_bounded_time_and_is_named() -> Result<()> {
    let paths = [ATTACHMENT, STORE, BRIDGE, PINS, PUBLISH];
    at_once(paths.len() + 1, |number| match paths.get(number) {
        Some(path) => case(path).with_context(|| (*path).to_owned()),
        None => several_at_once().context("several"),
    })
    .into_iter()
    .collect()
}

/// All locks are held by somebody who is not the plugin: a call waits once, not once for
/// each, and an ADD that gave up late still takes back what it has made.
fn several_at_once() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node, 0, false));
    let (stays, leaves) = (network.pod("stays")?, network.pod("leaves")?);
    let fresh = node.sandbox("fresh")?;
    let held: Vec<Flock<File>> = [STORE, BRIDGE, PINS]
        .iter()
        .map(|path| {
            node.within(|| {
                let file = File::options().write(true).open(path)?;
                Flock::lock(file, FlockArg::LockExclusiveNonblock)
                    .map_err(|(_, errno)| anyhow!("locking {path}: {errno}"))
            })
        })
        .collect::<Result<_>>()?;
    let own = i32::try_from(std::process::id())?;
    // It asks for maps before all else, and says what that means to a runtime.
    let status = || -> Result<()> {
        let reply = network.status()?.remove(0);
        let error = reply.failure()?;
        ensure!(
            error.text().contains(&format!("process {own} (")),
            "{error:?}"
        );
        ensure!(reply.duration < BOUND + SLACK, "{:?}", reply.duration);
        Ok(())
    };
    let valid = [stays.attachment(), leaves.attachment(), &fresh.attachment()];
    let calls = [
        ("ADD", call(&network, Verb::Add, &fresh.attachment())?),
        ("DEL", call(&network, Verb::Del, leaves.attachment())?),
        ("GC", gc(&network, &valid)?),
        ("CHECK", check(&network, &stays)?),
    ];
    thread::scope(|scope| {
        let status = scope.spawn(status);
        give_up(&node, own, &calls)?;
        status.join().map_err(|_| anyhow!("a panic"))?
    })?;
    drop(held);
    network.del(leaves.attachment())?;
    network.add(&fresh.attachment())?;
    network.check(&fresh.attachment())?;
    network.check(stays.attachment())?;
    Tables::read(&node)?.ensure_consistent()
}
