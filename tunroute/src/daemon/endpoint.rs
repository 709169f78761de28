//! The metrics endpoint follows the configuration. That it cannot listen never stands in the way of anything else.

use tracing::warn;

use super::Daemon;
use crate::control::metrics::Server;

impl Daemon {
    /// Starts, moves or ends the endpoint. What fails is tried again at the next look.
    pub(super) async fn update_endpoint(&mut self) {
        let listens_at = self.endpoint.as_ref().map(Server::listens_at);
        if listens_at == self.config.metrics.as_ref() {
            return;
        }
        // The old one first: it may have the address that the new one wants.
        self.endpoint = None;
        let Some(listen) = self.config.metrics.clone() else { return };
        let shown = listen.to_string();
        match Server::start(listen, self.calls.clone(), self.instruments.clone()).await {
            Ok(server) => {
                self.endpoint = Some(server);
                self.endpoint_error = None;
            }
            Err(error) => {
                let error = format!("no metrics at {shown}: {error}; choose another address in `metrics`");
                if self.endpoint_error.as_ref() != Some(&error) {
                    warn!("{error}");
                }
                self.endpoint_error = Some(error);
            }
        }
    }
}
