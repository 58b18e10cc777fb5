//! The step loop of one engine: turns the model's steps into real time.

use std::sync::Arc;
use std::time::Duration;

use kvroute_core::Time;
use rustc_hash::FxHashMap;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use super::{Shared, unix_s};
use crate::model::{Emitted, EngineModel, NewRequest, RequestId, Step};

/// How far the loop may fall behind before it gives up catching up. Below it, a late wake-up
/// shortens the next wait, so that the rate of steps is right although a timer is coarse.
const LAG_MAX: Duration = Duration::from_millis(50);

/// What the HTTP side asks of the loop.
pub(super) enum Command {
    /// Compute a sequence; its tokens go to `output`, which closes when the engine refuses it.
    Submit { request: NewRequest, output: mpsc::UnboundedSender<Emitted> },
    /// The client has gone.
    Abort(RequestId),
    /// Empty the prefix cache; answers whether it was done.
    Reset(oneshot::Sender<bool>),
}

struct Runner {
    shared: Arc<Shared>,
    model: EngineModel,
    outputs: FxHashMap<RequestId, mpsc::UnboundedSender<Emitted>>,
    origin: Instant,
    begin: Instant,
}

/// Runs until dropped, or until nobody can send commands.
pub(super) async fn run(
    shared: Arc<Shared>,
    model: EngineModel,
    mut commands: mpsc::UnboundedReceiver<Command>,
    pace: watch::Receiver<f64>,
) {
    let now = Instant::now();
    let outputs = FxHashMap::default();
    let mut runner = Runner { shared, model, outputs, origin: now, begin: now };
    loop {
        while let Ok(command) = commands.try_recv() {
            runner.take(command);
        }
        runner.model.set_pace(*pace.borrow());
        match runner.model.next_step(runner.time(runner.begin)) {
            Some(step) => runner.perform(step).await,
            None => {
                runner.shared.metrics().idle(runner.model.stats(), unix_s());
                let Some(command) = commands.recv().await else { return };
                runner.begin = Instant::now();
                runner.take(command);
            }
        }
    }
}

impl Runner {
    fn time(&self, at: Instant) -> Time {
        Time::ZERO + at.duration_since(self.origin)
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Submit { request, output } => {
                let id = request.id;
                match self.model.submit(self.time(Instant::now()), request) {
                    Ok(()) => {
                        self.outputs.insert(id, output);
                    }
                    Err(error) => tracing::warn!(%error, "a request was refused"),
                }
            }
            Command::Abort(id) => {
                self.model.abort(id);
                self.outputs.remove(&id);
            }
            Command::Reset(reply) => {
                // Nobody waits for the answer when the client has gone.
                let _ = reply.send(self.model.reset_prefix_cache());
            }
        }
    }

    /// Waits until the step is over and makes its results visible: events before output, so that
    /// whoever has the answer finds the events on their way.
    async fn perform(&mut self, mut step: Step) {
        let end = self.begin + step.duration;
        let now = Instant::now();
        if end > now {
            tokio::time::sleep_until(end).await;
        } else {
            tokio::task::yield_now().await;
        }
        self.begin = end.max(Instant::now() - LAG_MAX);
        let unix_s = unix_s();
        if let Some(publisher) = self.shared.publisher.as_ref().filter(|_| !step.events.is_empty())
        {
            publisher.publish(std::mem::take(&mut step.events), unix_s);
        }
        self.shared.metrics().step(&step, unix_s);
        for emitted in &step.emitted {
            let output = self.outputs.get(&emitted.id);
            // The client may have gone; then an abort is on its way.
            output.map(|output| output.send(*emitted));
            if emitted.finish.is_some() {
                self.outputs.remove(&emitted.id);
            }
        }
    }
}
