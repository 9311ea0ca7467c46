//! A storm of calls, against a model of what must exist.
//!
//! Several networks, each with a number of attachments that are always the same, and
//! callers who do to them in random order what runtimes do: ADD (of those that exist, too),
//! DEL, CHECK, GC, STATUS; ADDs that must fail; ADDs that want a port that only one can
//! have; sandboxes that go without a DEL; and, if asked for, calls that are killed. Each
//! reply must be the one that the model expects, and at pauses the node must have what the
//! model has: no more, no less.
//!
//! An attachment is worked on by one caller at a time, and a network's GC is alone in its
//! network, as the specification wants it from runtimes; everything else happens at once.

mod compare;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt,
    net::IpAddr,
    path::Path,
    sync::{
        Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use fastrand::Rng;
use serde_json::{Value, json};

use crate::{Attachment, Call, Network, Node, Outside, Reply, Sandbox, Verb, at_once};

/// How many attachments a network has.
const SLOTS: usize = 12;
/// How many ports several attachments want.
const CONTESTED: usize = 3;
/// The first of these, and the first of those that one attachment wants alone.
const CONTESTED_PORT: u16 = 30_000;
const OWN_PORT: u16 = 20_000;
/// CNI's code for an attachment that exists is ours.
const ALREADY_ATTACHED: u64 = 101;
/// What an ADD cannot do, whose configuration has this route.
const UNREACHABLE: &str = "203.0.113.0/24";
/// How long the kernel may take to end a namespace, on a busy machine.
const ENDING: Duration = Duration::from_secs(30);
/// So many of the last things that happened to an attachment are told when one fails.
const HISTORY: usize = 12;
/// A killed call has so long to live at most: about as long as it needs.
const LIFE: Duration = Duration::from_millis(25);

/// What a storm does besides the usual.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Weather {
    /// How many callers there are.
    pub callers: usize,
    /// Calls are killed at random moments.
    pub kills: bool,
}

/// What was done, and what it took.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// How often each thing was done.
    pub done: BTreeMap<&'static str, u64>,
    /// The longest call of each verb.
    pub longest: BTreeMap<&'static str, Duration>,
}

impl Tally {
    fn count(&mut self, what: &'static str) {
        *self.done.entry(what).or_default() += 1;
    }

    fn note(&mut self, verb: Verb, reply: &Reply) {
        let longest = self.longest.entry(verb.as_str()).or_default();
        *longest = (*longest).max(reply.duration);
    }
}

/// The model, and the node that must be as it is.
#[derive(Debug)]
pub struct Storm<'node> {
    node: &'node Node,
    seed: u64,
    networks: Vec<Stormy<'node>>,
    /// The attachments of others, which no GC may forget.
    stayers: Vec<(String, Attachment)>,
    /// The attachment of the network that publishes, and lives, that has each of these
    /// ports. Who may change that holds the lock while it does.
    contested: [Mutex<Option<usize>>; CONTESTED],
    tally: Mutex<Tally>,
    failed: AtomicBool,
    rounds: Mutex<u64>,
}

/// What a network is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kind {
    name: &'static str,
    bridge: &'static str,
    /// The third hexadecimal or decimal digit group of its subnets.
    subnet: u8,
    dual_stack: bool,
    gateway: bool,
    masquerade: Option<&'static str>,
    publishes: bool,
}

/// The networks of a storm.
const KINDS: [Kind; 5] = [
    Kind {
        name: "plain",
        bridge: "storm0",
        subnet: 1,
        dual_stack: true,
        gateway: true,
        masquerade: None,
        publishes: false,
    },
    Kind {
        name: "shares",
        bridge: "storm0",
        subnet: 2,
        dual_stack: false,
        gateway: false,
        masquerade: None,
        publishes: false,
    },
    Kind {
        name: "masquerades",
        bridge: "storm1",
        subnet: 3,
        dual_stack: true,
        gateway: true,
        masquerade: Some("ebpf"),
        publishes: false,
    },
    Kind {
        name: "publishes",
        bridge: "storm2",
        subnet: 4,
        dual_stack: true,
        gateway: true,
        masquerade: None,
        publishes: true,
    },
    Kind {
        name: "netfilter",
        bridge: "storm3",
        subnet: 5,
        dual_stack: true,
        gateway: true,
        masquerade: Some("nftables"),
        publishes: false,
    },
];

impl Kind {
    fn config(&self, node: &Node) -> Value {
        let subnet = self.subnet;
        // Few addresses more than attachments, so that they are given again soon.
        let last = SLOTS + 4;
        let mut ranges = vec![json!([{
            "subnet": format!("10.66.{subnet}.0/24"),
            "rangeStart": format!("10.66.{subnet}.2"),
            "rangeEnd": format!("10.66.{subnet}.{last}"),
        }])];
        if self.dual_stack {
            ranges.push(json!([{
                "subnet": format!("fd66:{subnet}::/64"),
                "rangeStart": format!("fd66:{subnet}::2"),
                "rangeEnd": format!("fd66:{subnet}::{last:x}"),
            }]));
        }
        let mut config = json!({
            "cniVersion": "1.1.0",
            "name": self.name,
            "type": node.plugin(),
            "bridge": self.bridge,
            "isDefaultGateway": self.gateway,
            "ipam": {"type": "host-local", "ranges": ranges},
        });
        if let Some(backend) = self.masquerade {
            config["ipMasq"] = json!(true);
            config["ipMasqBackend"] = json!(backend);
        }
        if self.publishes {
            config["capabilities"] = json!({"portMappings": true});
        }
        config
    }
}

#[derive(Debug)]
struct Stormy<'node> {
    kind: Kind,
    network: Network<'node>,
    /// The same network, but each ADD fails at its last step.
    failing: Network<'node>,
    /// A GC has it alone.
    gate: RwLock<()>,
    slots: Vec<Mutex<Slot>>,
}

/// An attachment and its sandbox.
#[derive(Debug)]
struct Slot {
    number: usize,
    attachment: Attachment,
    sandbox_name: String,
    sandbox: Option<Sandbox>,
    state: State,
    /// What the last ADD said, whatever became of that.
    result: Value,
    contested: Option<usize>,
    history: VecDeque<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// There is nothing.
    Absent,
    /// It lives.
    Attached,
    /// Its sandbox went without a DEL: the addresses and the record are there.
    Orphaned,
}

impl Slot {
    fn new(kind: &Kind, number: usize) -> Self {
        let sandbox_name = format!("{}-{number}", kind.name);
        // Two attachments of one container: the interface tells them apart.
        let attachment = Attachment::new(
            &format!("container-{}", number / 2),
            &format!("/run/netns/{sandbox_name}"),
            ["eth0", "net1"][number % 2],
        );
        Self {
            number,
            attachment,
            sandbox_name,
            sandbox: None,
            state: State::Absent,
            result: Value::Null,
            contested: None,
            history: VecDeque::new(),
        }
    }

    fn note(&mut self, what: impl fmt::Display) {
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(what.to_string());
    }

    /// What happened to it.
    fn tell(&self) -> String {
        let history: Vec<&str> = self.history.iter().map(String::as_str).collect();
        format!(
            "{} {:?} {:?} {:?}: {}",
            self.sandbox_name,
            self.state,
            self.host_veth(),
            self.addresses(),
            history.join(", ")
        )
    }

    /// Its sandbox, which is made if there is none.
    fn need_sandbox(&mut self, node: &Node) -> Result<()> {
        if self.sandbox.is_none() {
            self.sandbox = Some(node.sandbox(&self.sandbox_name)?);
        }
        Ok(())
    }

    /// The name of the host's end of the veth pair that the last ADD made.
    fn host_veth(&self) -> Option<&str> {
        self.result["interfaces"]
            .as_array()?
            .iter()
            .filter_map(|interface| interface["name"].as_str())
            .find(|name| name.starts_with("veth"))
    }

    /// The addresses that the last ADD gave.
    fn addresses(&self) -> BTreeSet<IpAddr> {
        self.result["ips"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok())
            .collect()
    }

    /// What it publishes, with a contested port or without: one number on all addresses of
    /// the node, one on a single one.
    fn mappings(&self, contested: Option<usize>) -> Value {
        let own = OWN_PORT + u16::try_from(self.number).unwrap_or_default();
        let mut mappings = vec![
            json!({"hostPort": own, "containerPort": 80, "protocol": "tcp"}),
            json!({"hostPort": own, "containerPort": 53, "protocol": "udp",
                "hostIP": Outside::NODE_V4.to_string()}),
        ];
        if let Some(number) = contested {
            let port = contested_port(number);
            mappings.push(json!({"hostPort": port, "containerPort": 81, "protocol": "tcp"}));
        }
        mappings.into()
    }

    /// That, as the maps have it.
    fn published(&self) -> BTreeSet<(IpAddr, u16, u8)> {
        let any: [IpAddr; 2] = [[0; 4].into(), [0; 16].into()];
        let mappings = self.mappings(self.contested);
        let mut published = BTreeSet::new();
        for mapping in mappings.as_array().into_iter().flatten() {
            let port = mapping["hostPort"].as_u64().unwrap_or_default();
            let port = u16::try_from(port).unwrap_or_default();
            if mapping["protocol"] == "tcp" {
                published.extend(any.map(|address| (address, port, 6)));
            } else {
                published.insert((Outside::NODE_V4.into(), port, 17));
            }
        }
        published
    }
}

fn contested_port(number: usize) -> u16 {
    CONTESTED_PORT + u16::try_from(number).unwrap_or_default()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'node> Storm<'node> {
    /// A storm that has not begun. `seed` decides what each caller does, but not the order
    /// in which the machine lets them.
    #[must_use]
    pub fn new(node: &'node Node, seed: u64) -> Self {
        let networks = KINDS
            .iter()
            .map(|kind| {
                let config = kind.config(node);
                let mut failing = config.clone();
                failing["ipam"]["routes"] = json!([{"dst": UNREACHABLE, "gw": "192.0.2.1"}]);
                Stormy {
                    kind: *kind,
                    network: Network::new(node, config),
                    failing: Network::new(node, failing),
                    gate: RwLock::new(()),
                    slots: (0..SLOTS)
                        .map(|number| Mutex::new(Slot::new(kind, number)))
                        .collect(),
                }
            })
            .collect();
        Self {
            node,
            seed,
            networks,
            stayers: Vec::new(),
            contested: Default::default(),
            tally: Mutex::default(),
            failed: AtomicBool::new(false),
            rounds: Mutex::new(0),
        }
    }

    /// The networks' names and configurations, for those who want to take part: what they
    /// attach must be told to [`Self::spare`].
    pub fn networks(&self) -> impl Iterator<Item = (&'static str, &Network<'node>)> {
        self.networks
            .iter()
            .map(|stormy| (stormy.kind.name, &stormy.network))
    }

    /// Lets an attachment of the network of this name live through the storm.
    pub fn spare(&mut self, network: &str, attachment: &Attachment) {
        self.stayers.push((network.to_owned(), attachment.clone()));
    }

    /// What was done so far.
    #[must_use]
    pub fn tally(&self) -> Tally {
        lock(&self.tally).clone()
    }

    /// How many attachments there are now by the model.
    #[must_use]
    pub fn attached(&self) -> usize {
        self.networks
            .iter()
            .flat_map(|stormy| &stormy.slots)
            .filter(|slot| lock(slot).state == State::Attached)
            .count()
    }

    /// Lets the callers work for a time, and waits for the last of them.
    ///
    /// # Errors
    ///
    /// The first reply that is not the model's, with what happened to the attachment before.
    pub fn rage(&self, weather: Weather, duration: Duration) -> Result<()> {
        let round = {
            let mut rounds = lock(&self.rounds);
            *rounds += 1;
            *rounds
        };
        let end = Instant::now() + duration;
        let results = at_once(weather.callers, |caller| {
            let mut rng = Rng::with_seed(self.seed ^ (round << 32) ^ caller as u64);
            while Instant::now() < end && !self.failed.load(Ordering::Relaxed) {
                let stormy = &self.networks[rng.usize(..self.networks.len())];
                if let Err(error) = self.act(stormy, &mut rng, weather) {
                    self.failed.store(true, Ordering::Relaxed);
                    return Err((stormy, error));
                }
            }
            Ok(())
        });
        // One is enough, and the others may follow from it.
        let Some((stormy, error)) = results.into_iter().find_map(Result::err) else {
            return Ok(());
        };
        let histories: Vec<String> = stormy.slots.iter().map(|slot| lock(slot).tell()).collect();
        Err(error.context(format!(
            "seed {}, round {round}, network {}; contested ports: {:?}; its attachments:\n{}",
            self.seed,
            stormy.kind.name,
            self.contested,
            histories.join("\n")
        )))
    }

    /// One thing that a runtime does.
    fn act(&self, stormy: &Stormy<'_>, rng: &mut Rng, weather: Weather) -> Result<()> {
        let what = rng.u32(..100);
        if what < 3 {
            let _alone = stormy.gate.write().unwrap_or_else(PoisonError::into_inner);
            return self.collect(stormy, rng, weather).context("GC");
        }
        let _shared = stormy.gate.read().unwrap_or_else(PoisonError::into_inner);
        if what < 6 && stormy.kind.publishes {
            return self.collide(stormy, rng).context("a contested port");
        }
        if what < 8 {
            return self.status(stormy);
        }
        let mut slot = lock(&stormy.slots[rng.usize(..stormy.slots.len())]);
        let slot = &mut *slot;
        let done = match what {
            8..45 => self.add(stormy, slot, rng),
            45..50 => self.add_in_vain(stormy, slot),
            50..75 => self.del(stormy, slot, rng),
            75..90 => self.check(stormy, slot),
            90..94 => self.orphan(slot),
            _ if weather.kills => self.kill(stormy, slot, rng),
            _ => self.add(stormy, slot, rng),
        };
        done.with_context(|| slot.sandbox_name.clone())
    }

    fn prepare(&self, network: &Network<'_>, verb: Verb, slot: &Slot) -> Result<Call> {
        let config = network.configs(Some(&slot.attachment))?.into_iter().next();
        let mut config = config.context("an empty list")?;
        if verb != Verb::Add && !slot.result.is_null() {
            config["prevResult"] = slot.result.clone();
        }
        Ok(network.call(&config, verb)?.attachment(&slot.attachment))
    }

    fn run(&self, verb: Verb, call: &Call) -> Result<Reply> {
        let reply = call.run(self.node)?;
        ensure!(
            reply.status.code().is_some(),
            "{} ended by a signal: {}",
            verb.as_str(),
            reply.stderr
        );
        lock(&self.tally).note(verb, &reply);
        Ok(reply)
    }

    fn count(&self, what: &'static str) {
        lock(&self.tally).count(what);
    }

    /// An ADD, perhaps of what is there.
    fn add(&self, stormy: &Stormy<'_>, slot: &mut Slot, rng: &mut Rng) -> Result<()> {
        let contested = (stormy.kind.publishes && rng.u8(..3) == 0).then(|| rng.usize(..CONTESTED));
        if slot.state == State::Attached {
            return self.add_again(&stormy.network, slot);
        }
        slot.need_sandbox(self.node)?;
        let Some(number) = contested else {
            let reply = self.add_with(stormy, slot, None)?;
            return self.added(stormy, slot, None, &reply);
        };
        let mut owner = lock(&self.contested[number]);
        let reply = self.add_with(stormy, slot, Some(number))?;
        if owner.is_some() {
            return self.refused(slot, number, &reply);
        }
        *owner = Some(slot.number);
        self.added(stormy, slot, Some(number), &reply)
    }

    /// The ADD itself, which wants a contested port, or none.
    fn add_with(
        &self,
        stormy: &Stormy<'_>,
        slot: &mut Slot,
        contested: Option<usize>,
    ) -> Result<Reply> {
        if stormy.kind.publishes {
            let mappings = slot.mappings(contested);
            slot.attachment = slot.attachment.clone().capability("portMappings", mappings);
        }
        self.run(Verb::Add, &self.prepare(&stormy.network, Verb::Add, slot)?)
    }

    /// The ADD has succeeded.
    fn added(
        &self,
        stormy: &Stormy<'_>,
        slot: &mut Slot,
        contested: Option<usize>,
        reply: &Reply,
    ) -> Result<()> {
        slot.note(format_args!("ADD with contested port {contested:?}"));
        slot.result = reply.success()?;
        slot.state = State::Attached;
        slot.contested = contested;
        self.count("ADD");
        let families = 1 + usize::from(stormy.kind.dual_stack);
        ensure!(slot.addresses().len() == families, "{}", slot.result);
        Ok(())
    }

    /// The ADD was refused, as another one has the port: nothing is left of it.
    fn refused(&self, slot: &mut Slot, number: usize, reply: &Reply) -> Result<()> {
        slot.note(format_args!("ADD refused for contested port {number}"));
        let error = reply.failure()?;
        let text = error.text();
        ensure!(
            text.contains(&contested_port(number).to_string()) && !text.contains("cleaning up"),
            "{error:?}"
        );
        slot.state = State::Absent;
        self.count("ADD of a taken port");
        Ok(())
    }

    /// An ADD of what lives changes nothing.
    fn add_again(&self, network: &Network<'_>, slot: &mut Slot) -> Result<()> {
        slot.note("ADD again");
        let reply = self.run(Verb::Add, &self.prepare(network, Verb::Add, slot)?)?;
        let error = reply.failure()?;
        ensure!(error.code == ALREADY_ATTACHED, "{error:?}");
        self.count("ADD of what is there");
        Ok(())
    }

    /// An ADD that fails at its end leaves nothing.
    fn add_in_vain(&self, stormy: &Stormy<'_>, slot: &mut Slot) -> Result<()> {
        if slot.state == State::Attached {
            return self.add_again(&stormy.failing, slot);
        }
        slot.need_sandbox(self.node)?;
        slot.note("ADD in vain");
        if stormy.kind.publishes {
            let mappings = slot.mappings(None);
            slot.attachment = slot.attachment.clone().capability("portMappings", mappings);
        }
        let call = self.prepare(&stormy.failing, Verb::Add, slot)?;
        let error = self.run(Verb::Add, &call)?.failure()?;
        let text = error.text();
        ensure!(
            text.contains(UNREACHABLE) && !text.contains("cleaning up"),
            "{error:?}"
        );
        slot.state = State::Absent;
        self.count("ADD in vain");
        Ok(())
    }

    /// DEL succeeds, whatever is there.
    fn del(&self, stormy: &Stormy<'_>, slot: &mut Slot, rng: &mut Rng) -> Result<()> {
        self.del_quietly(stormy, slot, rng.bool())?;
        if rng.bool() {
            slot.sandbox = None;
        }
        Ok(())
    }

    fn del_quietly(&self, stormy: &Stormy<'_>, slot: &mut Slot, with_netns: bool) -> Result<()> {
        slot.note(format_args!("DEL, netns {with_netns}"));
        let call = self.prepare(&stormy.network, Verb::Del, slot)?;
        let call = if with_netns {
            call
        } else {
            call.env("CNI_NETNS", "")
        };
        // Until it is done, the port is taken; then it is free.
        let owner = slot.contested.map(|number| lock(&self.contested[number]));
        let reply = self.run(Verb::Del, &call)?;
        ensure!(reply.success()?.is_null(), "DEL wrote {}", reply.stdout);
        self.count("DEL");
        gone(slot, owner);
        Ok(())
    }

    /// CHECK tells whether it lives.
    fn check(&self, stormy: &Stormy<'_>, slot: &mut Slot) -> Result<()> {
        if slot.result.is_null() {
            return Ok(());
        }
        slot.note("CHECK");
        let call = self.prepare(&stormy.network, Verb::Check, slot)?;
        let reply = self.run(Verb::Check, &call)?;
        if slot.state == State::Attached {
            ensure!(reply.success()?.is_null(), "CHECK wrote {}", reply.stdout);
            self.count("CHECK");
        } else {
            reply.failure().context("CHECK of what is gone")?;
            self.count("CHECK of what is gone");
        }
        Ok(())
    }

    /// The sandbox goes without a DEL.
    fn orphan(&self, slot: &mut Slot) -> Result<()> {
        if slot.state != State::Attached {
            return Ok(());
        }
        slot.note("the sandbox goes");
        // From now on whoever wants its port may take it.
        let owner = slot.contested.map(|number| lock(&self.contested[number]));
        slot.sandbox = None;
        let veth = slot.host_veth().context("no host veth")?.to_owned();
        let device = Path::new("/sys/class/net").join(&veth);
        self.node.within(|| {
            let end = Instant::now() + ENDING;
            while device.exists() {
                ensure!(Instant::now() < end, "{veth} outlives its pod");
                thread::sleep(Duration::from_millis(2));
            }
            Ok(())
        })?;
        gone(slot, owner);
        slot.state = State::Orphaned;
        self.count("sandboxes gone");
        Ok(())
    }

    /// STATUS finds nothing amiss, whatever others do meanwhile.
    fn status(&self, stormy: &Stormy<'_>) -> Result<()> {
        let config = stormy.network.configs(None)?.into_iter().next();
        let config = config.context("an empty list")?;
        let call = stormy.network.call(&config, Verb::Status)?;
        let reply = self.run(Verb::Status, &call)?;
        self.count("STATUS");
        ensure!(
            reply
                .success()
                .with_context(|| format!("STATUS of {}", stormy.kind.name))?
                .is_null()
        );
        Ok(())
    }

    /// GC: what is not valid goes, and nothing else. The caller has the network alone.
    fn collect(&self, stormy: &Stormy<'_>, rng: &mut Rng, weather: Weather) -> Result<()> {
        let mut slots: Vec<_> = stormy.slots.iter().map(lock).collect();
        let keep: Vec<bool> = slots
            .iter()
            .map(|slot| match slot.state {
                State::Absent => rng.u8(..4) == 0,
                State::Attached => rng.u8(..5) != 0,
                State::Orphaned => rng.bool(),
            })
            .collect();
        let valid: Vec<&Attachment> = slots
            .iter()
            .zip(&keep)
            .filter(|(_, keep)| **keep)
            .map(|(slot, _)| &slot.attachment)
            .collect();
        let call = self.gc_call(stormy, &valid)?;
        if weather.kills && rng.u8(..4) == 0 {
            let _ = call.run_until_killed(self.node, random(rng))?;
            self.count("GC killed");
        }
        let reply = self.run(Verb::Gc, &call)?;
        for (slot, keep) in slots.iter_mut().zip(keep) {
            slot.note(if keep { "GC spares it" } else { "GC" });
            if !keep {
                let owner = slot.contested.map(|number| lock(&self.contested[number]));
                gone(slot, owner);
            }
        }
        ensure!(reply.success()?.is_null(), "GC wrote {}", reply.stdout);
        self.count("GC");
        Ok(())
    }

    fn gc_call(&self, stormy: &Stormy<'_>, valid: &[&Attachment]) -> Result<Call> {
        let config = stormy.network.configs(None)?.into_iter().next();
        let mut config = config.context("an empty list")?;
        let stayers = self
            .stayers
            .iter()
            .filter(|(network, _)| network == stormy.kind.name)
            .map(|(_, attachment)| attachment);
        config["cni.dev/valid-attachments"] = valid
            .iter()
            .copied()
            .chain(stayers)
            .map(|valid| json!({"containerID": valid.container_id, "ifname": valid.ifname}))
            .collect();
        stormy.network.call(&config, Verb::Gc)
    }

    /// Several want one port at once: one gets it, if nobody has it.
    fn collide(&self, stormy: &Stormy<'_>, rng: &mut Rng) -> Result<()> {
        let mut numbers: Vec<usize> = (0..stormy.slots.len()).collect();
        rng.shuffle(&mut numbers);
        numbers.truncate(3);
        // In one order, so that two who do this wait for each other and not in a ring.
        numbers.sort_unstable();
        let mut slots: Vec<_> = numbers
            .iter()
            .map(|&number| lock(&stormy.slots[number]))
            .collect();
        for slot in &mut slots {
            if slot.state != State::Absent {
                self.del_quietly(stormy, slot, true)?;
            }
            slot.need_sandbox(self.node)?;
        }
        let number = rng.usize(..CONTESTED);
        let mut owner = lock(&self.contested[number]);
        let taken = owner.is_some();
        let contenders: Vec<_> = slots
            .iter_mut()
            .map(|slot| Mutex::new(&mut **slot))
            .collect();
        let replies = at_once(contenders.len(), |at| {
            self.add_with(stormy, &mut lock(&contenders[at]), Some(number))
        });
        drop(contenders);
        let mut winners = 0;
        for (slot, reply) in slots.iter_mut().zip(replies) {
            let reply = reply?;
            if reply.status.success() {
                winners += 1;
                *owner = Some(slot.number);
                self.added(stormy, slot, Some(number), &reply)?;
            } else {
                self.refused(slot, number, &reply)?;
            }
        }
        self.count("collisions");
        ensure!(
            winners == usize::from(!taken),
            "{winners} of {numbers:?} have got port {}, which was taken: {taken}",
            contested_port(number)
        );
        Ok(())
    }

    /// A call is killed, and the next one finds its way.
    fn kill(&self, stormy: &Stormy<'_>, slot: &mut Slot, rng: &mut Rng) -> Result<()> {
        slot.need_sandbox(self.node)?;
        if stormy.kind.publishes && slot.state != State::Attached {
            let mappings = slot.mappings(None);
            slot.attachment = slot.attachment.clone().capability("portMappings", mappings);
        }
        let verb = if rng.u8(..3) == 0 {
            Verb::Del
        } else {
            Verb::Add
        };
        let may_be_there = verb == Verb::Add || slot.state == State::Attached;
        slot.note(format_args!("{} killed", verb.as_str()));
        // While it is not known what is left, nobody may want the port.
        let call = self.prepare(&stormy.network, verb, slot)?;
        let owner = slot.contested.map(|number| lock(&self.contested[number]));
        let _ = call.run_until_killed(self.node, random(rng))?;
        self.count("killed");
        if rng.bool() {
            slot.note("ADD after that");
            let reply = self.run(Verb::Add, &self.prepare(&stormy.network, Verb::Add, slot)?)?;
            if !reply.status.success() {
                let error = reply.failure()?;
                ensure!(may_be_there && error.code == ALREADY_ATTACHED, "{error:?}");
            }
        }
        let call = self.prepare(&stormy.network, Verb::Del, slot)?;
        slot.note("DEL after that");
        let reply = self.run(Verb::Del, &call)?;
        ensure!(reply.success()?.is_null(), "DEL wrote {}", reply.stdout);
        gone(slot, owner);
        Ok(())
    }

    /// Ends all attachments, as a runtime does that stops: DEL for each, and a GC.
    ///
    /// # Errors
    ///
    /// A call's error.
    pub fn calm(&self) -> Result<()> {
        for stormy in &self.networks {
            for slot in &stormy.slots {
                let mut slot = lock(slot);
                if slot.state != State::Absent {
                    self.del_quietly(stormy, &mut slot, true)?;
                }
                slot.sandbox = None;
            }
        }
        self.collect_orphans()
    }

    /// GC of each network, by which orphans go.
    fn collect_orphans(&self) -> Result<()> {
        for stormy in &self.networks {
            let mut slots: Vec<_> = stormy.slots.iter().map(lock).collect();
            let valid: Vec<&Attachment> = slots
                .iter()
                .filter(|slot| slot.state == State::Attached)
                .map(|slot| &slot.attachment)
                .collect();
            let reply = self.run(Verb::Gc, &self.gc_call(stormy, &valid)?)?;
            ensure!(reply.success()?.is_null(), "GC wrote {}", reply.stdout);
            for slot in &mut slots {
                if slot.state == State::Orphaned {
                    slot.note("GC at a pause");
                    slot.state = State::Absent;
                }
            }
        }
        Ok(())
    }
}

/// Nothing is left of the attachment, and nobody has its contested port, whose lock is held.
fn gone(slot: &mut Slot, owner: Option<MutexGuard<'_, Option<usize>>>) {
    if let Some(mut owner) = owner {
        *owner = None;
    }
    slot.contested = None;
    slot.state = State::Absent;
}

/// How long a call that is killed may live.
fn random(rng: &mut Rng) -> Duration {
    LIFE.mul_f64(rng.f64())
}

/// The seed of a storm: that of `BPF_BRIDGE_SEED`, or a new one. It is printed, to be used
/// again.
///
/// # Errors
///
/// That the variable is no number.
pub fn seed() -> Result<u64> {
    match std::env::var("BPF_BRIDGE_SEED") {
        Ok(seed) => match seed.parse() {
            Ok(seed) => Ok(seed),
            Err(error) => bail!("BPF_BRIDGE_SEED is {seed:?}: {error}"),
        },
        Err(_) => Ok(fastrand::u64(..)),
    }
}
